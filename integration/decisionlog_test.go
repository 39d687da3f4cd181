// Decision logs and status in OPA's protocol, end to end: a stock OPA reports to the
// CA, an agent does, and what both of them write OPA's own types read.

package integration_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
)

// events are those of a log, by decision ID.
func events(t *testing.T, path string) map[string]map[string]any {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	all := map[string]map[string]any{}
	for line := range bytes.Lines(data) {
		var e map[string]any
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		all[fmt.Sprint(e["decision_id"])] = e
	}
	return all
}

// at is what e has at a path of keys.
func at(e any, path ...string) any {
	for _, key := range path {
		object, _ := e.(map[string]any)
		e = object[key]
	}
	return e
}

// The golden events of policy/decisionlog, and the log of a running agent, are what
// OPA's types read and write, to the key.
func TestOPAsTypesReadOurEvents(t *testing.T) {
	lines, err := os.ReadFile("../policy/decisionlog/testdata/events.golden.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	read := bytes.Split(stage.OPAEvents(t, lines), []byte("\n"))
	for i, line := range bytes.Split(bytes.TrimSpace(lines), []byte("\n")) {
		var want, got any
		if err := errors.Join(json.Unmarshal(line, &want), json.Unmarshal(read[i], &got)); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("OPA makes %s of %s", read[i], line)
		}
	}
}

func TestStockOPAReportsStatusAndDecisions(t *testing.T) {
	opa := stockOPA(t)
	log := filepath.Join(t.TempDir(), "decisions.jsonl")
	d := stage.SeparateOf(t, "dev.local", "decision_log_file: "+log) // whose services the policy names
	d.Merlon("policy", "push", quickstartPolicy)
	answers := runOPA(t, opa, reportingConfig(t, d))
	stage.Eventually(t, "the stock OPA answers from the bundle", func() error {
		return errors.Join(answers.expect("GET", true, "ALLOWED"), answers.expect("DELETE", false, "METHOD"))
	})
	stage.Eventually(t, "its decisions are in the CA's log", func() error {
		var got []string
		for _, e := range events(t, log) {
			if at(e, "bundles", "main", "revision") == "1" && strings.HasPrefix(fmt.Sprint(at(e, "labels", "uploader")), "token:main:") {
				got = append(got, fmt.Sprint(at(e, "result", "reason")))
			}
		}
		if !slices.Contains(got, "ALLOWED") || !slices.Contains(got, "METHOD") {
			return fmt.Errorf("there are %q", got)
		}
		return nil
	})
	stage.Eventually(t, "its status is known", func() error {
		if m := stage.Metrics(t, d.Health); !strings.Contains(m, "merlon_ca_reporting_instances 1") {
			return errors.New("/metrics knows of no instance")
		}
		return nil
	})
	opaIs := func(what string, generation uint64, lags bool) {
		t.Helper()
		stage.Eventually(t, what, func() error {
			for _, p := range rolloutStatus(t, d).Points {
				if p.Kind == "opa" && p.Generation == generation && (p.LaggingSince != nil) == lags && p.Connected && p.Fault == "" &&
					strings.HasPrefix(p.Uploader, "token:main:") && p.Labels["region"] == "east" && p.Labels["version"] != "" {
					return nil
				}
			}
			return fmt.Errorf("%+v", rolloutStatus(t, d).Points)
		})
	}
	opaIs("the stock OPA is in the status of policy", 1, false)
	d.Merlon("policy", "push", policyFolder(t, d, "GET"))
	opaIs("it has the next generation", 2, false)
	if table := d.Merlon("policy", "status"); !strings.Contains(table, "opa ") || !strings.Contains(table, "token:main:") {
		t.Errorf("the table has no OPA:\n%s", table)
	}
	data, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	stage.OPAEvents(t, data)
	if said := answers.log.String(); strings.Contains(said, "upload failed") || strings.Contains(said, "tatus update failed") {
		t.Error("the stock OPA complains")
	}
	answers.stop() // it gets no further generation
	d.Merlon("policy", "push", policyFolder(t, d, "POST"))
	opaIs("it lags", 2, true)
	if _, stderr, err := d.Try("policy", "status", "--lag-bound", "0s"); err == nil || !strings.Contains(stderr, "lag for longer than 0s") {
		t.Errorf("exit %v: %s", err, stderr)
	}
}

// reportingConfig is a stock OPA's whose bundles, status and decision log go by one
// service.
func reportingConfig(t *testing.T, d *stage.Domain) string {
	t.Helper()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, []byte(d.Merlon("trust", "show", "-o", "pem")), 0o600); err != nil {
		t.Fatal(err)
	}
	path := opaConfig(t, d, d.HTTPS, ca)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(text, &config); err != nil {
		t.Fatal(err)
	}
	at(config, "services", "merlon").(map[string]any)["url"] = d.HTTPS + "/v1"
	at(config, "bundles", "main").(map[string]any)["resource"] = "policy/bundles/main"
	delay := map[string]any{"min_delay_seconds": 1, "max_delay_seconds": 1}
	maps.Copy(config, map[string]any{
		"labels": map[string]any{"region": "east"},
		"status": map[string]any{"service": "merlon"}, "decision_logs": map[string]any{"service": "merlon", "reporting": delay},
	})
	if text, err = json.Marshal(config); err == nil {
		err = os.WriteFile(path, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// What a service decides in process reaches the agent's own log and, by it, the
// CA's; also what a dry-run grant would have changed.
func TestDecisionsOfServicesReachTheLogs(t *testing.T) {
	dir := t.TempDir()
	atCA, atAgent := filepath.Join(dir, "ca.jsonl"), filepath.Join(dir, "agent.jsonl")
	d := stage.CAAlone(t, "merlon-ca", nil, "decision_log_file: "+atCA)
	token := d.Token()
	d.StartAgentBy(token.RootHash, "join_token: "+token.Token, "decision_log_file: "+atAgent, "decision_log_upload: ca", "decision_metrics: row")
	stage.Eventually(t, "the agent is attested", func() error {
		if list := d.Merlon("agent", "list"); !strings.Contains(list, token.AgentID) {
			return fmt.Errorf("there are %s", list)
		}
		return nil
	})
	id := me(t, d)
	url := services.Serve(t, id, http.HandlerFunc(services.OK))
	c := client(t, id)
	folder := t.TempDir()
	text := strings.ReplaceAll(`grants:
  - {id: reads, from: [ME], to: [ME], http: {methods: [GET], paths: [/a, /watched]}}
  - {id: tried, from: [ME], to: [ME], http: {paths: [/watched]}, effect: deny, mode: dry-run}
`, "ME", d.ID("/me"))
	if err := os.WriteFile(filepath.Join(folder, "grants.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", folder)
	services.WantReason(t, "the policy is active", c, url+"/a", "200 OK")
	services.WantReason(t, "a dry-run grant decides nothing", c, url+"/watched", "200 OK")
	_, err := c.Get(url + "/denied?token=canary")
	denied, isDenied := errors.AsType[*sdk.DeniedError](err)
	if !isDenied {
		t.Fatalf("error = %v; want a DeniedError", err)
	}
	for where, path := range map[string]string{"agent": atAgent, "CA": atCA} {
		stage.Eventually(t, "both are in the log of the "+where, func() error {
			all := events(t, path)
			if all[denied.DecisionID] == nil {
				return errors.New("the denial is missing")
			}
			for _, e := range all {
				if reflect.DeepEqual(at(e, "custom", "merlon", "would_differ"), []any{"tried"}) && at(e, "result", "allow") == true {
					return nil
				}
			}
			return errors.New("what the dry-run grant would have changed is missing")
		})
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		stage.OPAEvents(t, data)
		if bytes.Contains(data, []byte("canary")) {
			t.Errorf("the log of the %s shows the query", where)
		}
	}
	if e := events(t, atCA)[denied.DecisionID]; at(e, "labels", "uploader") != token.AgentID || at(e, "result", "reason") != "PATH" {
		t.Errorf("the denial is %v", e)
	}
	// What is written down can be decided again: with the dry-run grant enforced it
	// comes out as the log said that it would.
	enforced := t.TempDir()
	if err := os.WriteFile(filepath.Join(enforced, "grants.yaml"), []byte(strings.ReplaceAll(text, ", mode: dry-run", "")), 0o600); err != nil {
		t.Fatal(err)
	}
	for folder, want := range map[string]int{folder: 0, enforced: 1} {
		var report struct {
			Changed []struct {
				After struct {
					RuleID string `json:"rule_id"`
				} `json:"after"`
			} `json:"changed"`
		}
		stage.Decode(t, d.Merlon("policy", "replay", "--log", atAgent, "--bundle", folder, "-o", "json"), &report)
		if len(report.Changed) != want || want > 0 && report.Changed[0].After.RuleID != "tried" {
			t.Errorf("replayed, %d groups of calls come out otherwise: %+v; want %d", len(report.Changed), report, want)
		}
	}
	stage.Eventually(t, "the agent counts by row", func() error {
		if m := stage.Metrics(t, d.AgentHealth); !strings.Contains(m, fmt.Sprintf(`merlon_agent_decision_rows_total{destination=%[1]q,reason="PATH",rule_id="",source=%[1]q} 1`, d.ID("/me"))) {
			return errors.New("/metrics has no such row")
		}
		return nil
	})
}
