// The log of decisions: the agent's own and those of services, on disk when the agent
// has ended, and without what is not to be shown.

package agent_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent"
	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/policy"
)

// loggedDecision is the part of an event that is looked at.
type loggedDecision struct {
	Labels     map[string]string `json:"labels"`
	DecisionID string            `json:"decision_id"`
	Bundles    map[string]struct {
		Revision string `json:"revision"`
	} `json:"bundles"`
	Result struct {
		Allow  bool   `json:"allow"`
		Reason string `json:"reason"`
	} `json:"result"`
	Input  json.RawMessage `json:"input"`
	Custom struct {
		Merlon struct {
			SampleRate  float64  `json:"sample_rate"`
			Allowed     uint64   `json:"allowed"`
			WouldDiffer []string `json:"would_differ"`
			Incomplete  []string `json:"incomplete"`
			Dropped     uint64   `json:"dropped"`
		} `json:"merlon"`
	} `json:"custom"`
}

// readLog reads all events, by decision ID.
func readLog(t *testing.T, path string) map[string]loggedDecision {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	events := map[string]loggedDecision{}
	for line := range bytes.Lines(data) {
		var e loggedDecision
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		events[e.DecisionID] = e
	}
	return events
}

func TestDecisionsAreWrittenDown(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	cfg := newConfig(t, ca)
	cfg.DecisionLogFile = filepath.Join(t.TempDir(), "decisions.jsonl")
	cfg.DecisionLogHeaders, cfg.DecisionLogQuery, cfg.DecisionMetrics = []string{"x-shown"}, []string{"page"}, "row"
	n := start(t, cfg)
	n.waitReady(t)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	n.policyIs(t, 1)
	call := func(method string) *agentpb.AuthorizeRequest {
		return &agentpb.AuthorizeRequest{
			Destination: "spiffe://" + td + "/orders", Source: "spiffe://" + td + "/web", Protocol: "http", Method: method, Path: "/orders", Query: "page=1&token=canary",
			Headers: map[string]*agentpb.HeaderValues{"x-shown": {Values: []string{"shown"}}, "x-other": {Values: []string{"canary"}}, "cookie": {Values: []string{"canary"}}},
		}
	}
	allowed, err := n.authorize(t, call("GET"))
	if err != nil {
		t.Fatal(err)
	}
	denied, err := n.authorize(t, call("POST"))
	if err != nil {
		t.Fatal(err)
	}
	service := &agentpb.DecisionRecord{
		Decision: &agentpb.Decision{Allow: true, Reason: "ALLOWED", RuleId: "web-reads", DecisionId: policy.NewDecisionID().String(), PolicyGeneration: 1},
		Input:    call("GET"), DecidedAt: timestamppb.Now(), StandsFor: 40, Incomplete: []string{"path"},
	}
	differs := &agentpb.DecisionRecord{
		Decision: &agentpb.Decision{Allow: true, Reason: "ALLOWED", RuleId: "web-reads", DecisionId: policy.NewDecisionID().String(), PolicyGeneration: 1, DryRun: []string{"tried"}},
		Input:    call("GET"), DecidedAt: timestamppb.Now(),
	}
	rows := []*agentpb.DecisionCount{
		{Source: "spiffe://" + td + "/web", Destination: "spiffe://" + td + "/orders", RuleId: "web-reads", Reason: "ALLOWED", Count: 41},
		{Source: "other", Destination: "other", RuleId: "other", Reason: "NO_GRANT", Count: 2},
	}
	report(t, n, &agentpb.ReportRequest{Records: []*agentpb.DecisionRecord{service, differs}, Rows: rows, Decided: map[string]uint64{"ALLOWED": 41, "NO_GRANT": 2}, Dropped: 5}, codes.OK)
	metrics := n.health(t, "/metrics")
	for _, want := range []string{
		`merlon_agent_decision_rows_total{destination="spiffe://example.test/orders",reason="ALLOWED",rule_id="web-reads",source="spiffe://example.test/web"} 42`,
		`merlon_agent_decision_rows_total{destination="other",reason="NO_GRANT",rule_id="other",source="other"} 2`,
		`merlon_agent_decisions_total{reason="ALLOWED"} 42`, `merlon_agent_decision_log_lost_total 5`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	n.stop() // writes what is there

	data, err := os.ReadFile(cfg.DecisionLogFile)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(data, []byte("canary")) || bytes.Contains(data, []byte("x-other")) {
		t.Errorf("the log shows what it must not:\n%s", data)
	}
	events := readLog(t, cfg.DecisionLogFile)
	told := uint64(0)
	for id, want := range map[string]struct {
		allow    bool
		reason   string
		standFor uint64
		differ   []string
	}{
		allowed.GetDecisionId():               {true, "ALLOWED", 1, nil},
		denied.GetDecisionId():                {false, "METHOD", 0, nil},
		service.GetDecision().GetDecisionId(): {true, "ALLOWED", 40, nil},
		differs.GetDecision().GetDecisionId(): {true, "ALLOWED", 0, []string{"tried"}},
	} {
		e, ok := events[id]
		m := e.Custom.Merlon
		if !ok || e.Result.Allow != want.allow || e.Result.Reason != want.reason || m.Allowed != want.standFor || !slices.Equal(m.WouldDiffer, want.differ) || e.Bundles["main"].Revision != "1" {
			t.Errorf("event %s: %+v; want %+v", id, e, want)
		}
		if e.Labels["id"] != "spiffe://"+td+"/agent/n1" || want.standFor > 0 && m.SampleRate != 1/float64(want.standFor) {
			t.Errorf("event %s: labels %v, rate %v", id, e.Labels, m.SampleRate)
		}
		if in, err := policy.ParseInput(e.Input); err != nil || in.Query != "page=1" || len(in.HeaderMap()) != 1 || in.HeaderMap()["x-shown"][0] != "shown" {
			t.Errorf("event %s: input %s, %v", id, e.Input, err)
		}
	}
	for _, e := range events {
		told += e.Custom.Merlon.Dropped
	}
	if told != 5 || !slices.Equal(events[service.GetDecision().GetDecisionId()].Custom.Merlon.Incomplete, []string{"path", "headers"}) {
		t.Errorf("%d events that tell of %d dropped: %+v", len(events), told, events)
	}
}

func report(t *testing.T, n *node, m *agentpb.ReportRequest, want codes.Code) {
	t.Helper()
	cc, ctx := conn(t, n.socket)
	stream, err := agentpb.NewLocalClient(cc).Report(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(m); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.CloseAndRecv(); status.Code(err) != want {
		t.Errorf("Report() = %v; want %v", err, want)
	}
}

// A service counts its own calls only, and decisions for reasons that there are.
func TestRowsOfOthersAreRefused(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	for row, want := range map[*agentpb.DecisionCount]codes.Code{
		{Source: "spiffe://example.test/web", Destination: "spiffe://example.test/other", Reason: "ALLOWED", Count: 1}:    codes.PermissionDenied,
		{Source: "spiffe://example.test/web", Destination: "spiffe://example.test/orders", Reason: "BECAUSE", Count: 1}:   codes.InvalidArgument,
		{Source: "spiffe://example.test/web", Destination: "spiffe://example.test/orders", Reason: "NO_GRANT", Count: 1}:  codes.OK,
		{Source: "", Destination: "spiffe://example.test/orders", Reason: "NO_IDENTITY", Count: 1}:                        codes.OK,
		{Source: "other", Destination: "spiffe://example.test/other", RuleId: "other", Reason: "ALLOWED", Count: 1 << 40}: codes.OK,
	} {
		report(t, n, &agentpb.ReportRequest{Rows: []*agentpb.DecisionCount{row}}, want)
	}
	if metrics := n.health(t, "/metrics"); strings.Contains(metrics, "spiffe://") {
		t.Error("/metrics has SPIFFE IDs, which nobody asked for")
	}
}

func TestDecisionLogSettings(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*agent.Config)
		field  string
	}{
		"a relative file":  {func(c *agent.Config) { c.DecisionLogFile = "d.jsonl" }, "decision_log_file"},
		"packed stdout":    {func(c *agent.Config) { c.DecisionLogFile, c.DecisionLogGzip = "stdout", true }, "decision_log_gzip"},
		"less than a MiB":  {func(c *agent.Config) { c.DecisionLogMaxMiB = -1 }, "decision_log_max_mib"},
		"keeps less":       {func(c *agent.Config) { c.DecisionLogKeep = -1 }, "decision_log_keep"},
		"plain http":       {func(c *agent.Config) { c.DecisionLogUpload = "http://logs.example.org/" }, "decision_log_upload"},
		"no URL":           {func(c *agent.Config) { c.DecisionLogUpload = "logs" }, "decision_log_upload"},
		"a password":       {func(c *agent.Config) { c.DecisionLogUpload = "https://u:p@logs.example.org" }, "decision_log_upload"},
		"token for the CA": {func(c *agent.Config) { c.DecisionLogUpload, c.DecisionLogTokenFile = "ca", "/t" }, "decision_log_token_file"},
		"roots for nobody": {func(c *agent.Config) { c.DecisionLogCAFile = "/r" }, "decision_log_ca_file"},
		"an upper case":    {func(c *agent.Config) { c.DecisionLogHeaders = []string{"X-A"} }, "decision_log_headers"},
		"a secret":         {func(c *agent.Config) { c.DecisionLogHeaders = []string{"cookie"} }, "decision_log_headers"},
		"other metrics":    {func(c *agent.Config) { c.DecisionMetrics = "all" }, "decision_metrics"},
		"stdout":           {func(c *agent.Config) { c.DecisionLogFile = "stdout" }, ""},
		"the CA":           {func(c *agent.Config) { c.DecisionLogUpload = "ca" }, ""},
		"a URL": {func(c *agent.Config) {
			c.DecisionLogUpload, c.DecisionLogTokenFile = "https://logs.example.org/logs", "/t"
		}, ""},
	} {
		cfg := agent.Config{TrustDomain: td, CAAddress: agent.Addresses{"ca:1"}, JoinToken: "t", RootHash: strings.Repeat("0", 64)}
		tt.change(&cfg)
		invalid, err := (*agent.InvalidError)(nil), cfg.Validate()
		if e, ok := err.(*agent.InvalidError); ok { //nolint:errorlint // Validate promises the type
			invalid = e
		}
		if (err == nil) != (tt.field == "") || err != nil && (invalid == nil || invalid.Field != tt.field) {
			t.Errorf("%s: %v; want a complaint about %q", name, err, tt.field)
		}
	}
}

// A log that cannot be opened is found at the start, and not with the first denial.
func TestDecisionLogThatCannotBeOpenedEndsTheStart(t *testing.T) {
	cfg := newConfig(t, fakeca.New(t, td))
	cfg.DecisionLogFile = t.TempDir()
	if _, err := agent.New(cfg); err == nil || !strings.Contains(err.Error(), "decision_log_file") {
		t.Errorf("New() = %v; want decision_log_file named", err)
	}
}
