// What enforcement points report, over HTTPS and with the identities that the CA gave.

package ca_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
)

// What a workload and an agent say of themselves is kept under their own names.
func TestStatusIsKeptUnderWhoSentIt(t *testing.T) {
	c := startCA(t, tempDir(t))
	who := identities(t, c)
	for client, want := range map[string]int{"anonymous": 401, "agent": 200, "workload": 200, "admin": 200} {
		code, _, body := do(t, who[client], "POST", c.url("/v1/status"), nil, []byte(`{"labels":{"id":"x"}}`))
		if code != want {
			t.Errorf("%s: %d %s; want %d", client, code, body, want)
		}
	}
}

// Decisions are taken from those who made them, about themselves: an agent's about
// the destinations of its node, a workload's about its own.
func TestDecisionLogsAreScoped(t *testing.T) {
	dir := tempDir(t)
	path := filepath.Join(dir, "decisions.jsonl")
	c := startCA(t, dir, func(cfg *ca.Config) { cfg.DecisionLogFile = path })
	who := identities(t, c) // entries of n1: /web and /console
	c.agent("n2")
	if _, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: newEntry("n2", "other")}); err != nil {
		t.Fatal(err)
	}
	event := func(id, destination string) string {
		return fmt.Sprintf(`{"labels":{"id":"i"},"decision_id":%q,"timestamp":"2026-11-26T04:00:00Z","input":{"attributes":{"destination":{"principal":"spiffe://shop.test/%s"}}}}`, id, destination)
	}
	for client, want := range map[string]int{"anonymous": 401, "agent": 200, "workload": 200} {
		body := "[" + event(client+"-web", "web") + "," + event(client+"-console", "console") + "," + event(client+"-other", "other") + "]"
		if code, _, said := do(t, who[client], "POST", c.url("/v1/logs"), nil, []byte(body)); code != want {
			t.Errorf("%s: %d %s; want %d", client, code, said, want)
		}
	}
	token := readerToken(t, c, "main", 0)
	if code, _, said := do(t, who["anonymous"], "POST", c.url("/v1/logs/east"), token, []byte("["+event("token-other", "other")+"]")); code != 200 {
		t.Errorf("with a token: %d %s", code, said)
	}
	if code, _, _ := do(t, who["agent"], "POST", c.url("/v1/logs"), nil, []byte(`[{}]`)); code != 400 {
		t.Errorf("malformed: %d; want 400", code)
	}
	c.stop() // writes what waits
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	kept := map[string]string{}
	for line := range bytes.Lines(data) {
		var e struct {
			ID     string            `json:"decision_id"`
			Labels map[string]string `json:"labels"`
		}
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		kept[e.ID] = e.Labels["uploader"]
	}
	if !strings.HasPrefix(kept["token-other"], "token:main:") {
		t.Errorf("the token's decisions are under %q", kept["token-other"])
	}
	delete(kept, "token-other")
	want := map[string]string{
		"agent-web": "spiffe://shop.test/agent/n1", "agent-console": "spiffe://shop.test/agent/n1", "workload-web": "spiffe://shop.test/web",
	}
	if !maps.Equal(kept, want) {
		t.Errorf("kept %v; want %v", kept, want)
	}
}

// sendStatus has an OPA say which generation is active.
func sendStatus(t *testing.T, c *testCA, token http.Header, id string, generation uint64) {
	t.Helper()
	client := httpClient(t, nil, nil)
	body := fmt.Appendf(nil, `{"labels":{"id":%q,"region":"east"},"bundles":{"main":{"active_revision":"%d"}}}`, id, generation)
	if code, _, said := do(t, client, "POST", c.url("/v1/status"), token, body); code != 200 {
		t.Fatalf("%s: %d %s", body, code, said)
	}
}

// A stock OPA is a place where policy decides, by its own word, below who proved to
// have sent it.
func TestStockOPAsAreInTheStatusOfPolicy(t *testing.T) {
	c := startCA(t, tempDir(t))
	who := identities(t, c)
	first := pushPolicy(t, c)
	token, other := readerToken(t, c, "main", 0), readerToken(t, c, "other", 0)
	send := func(client string, header http.Header, body string) {
		t.Helper()
		if code, _, said := do(t, who[client], "POST", c.url("/v1/status"), header, []byte(body)); code != 200 {
			t.Fatalf("%s: %d %s", body, code, said)
		}
	}
	status := func(id, name, revision, more string) string {
		return fmt.Sprintf(`{"labels":{"id":%q,"version":"1.22.2"},"bundles":{%q:{"active_revision":%q%s}}}`, id, name, revision, more)
	}
	send("anonymous", token, status("current", "main", "1", ""))
	send("anonymous", token, status("renamed", "authz", "1", ""))
	send("anonymous", token, status("empty", "main", "", `,"code":"bundle_error","message":"no signature"`))
	send("anonymous", token, status("alien", "main", "v7", ""))
	send("anonymous", other, status("elsewhere", "main", "1", ""))
	send("workload", nil, status("own", "main", "1", ""))
	send("workload", nil, status("unnamed", "authz", "1", "")) // of whichever bundle
	want := func(what string, generation uint64, lines ...string) {
		t.Helper()
		st := c.policyStatus()
		var got []string
		for _, p := range st.GetPoints() {
			if p.GetKind() != "opa" {
				continue
			}
			uploader, _, _ := strings.Cut(strings.TrimPrefix(p.GetUploader(), "token:"), ":")
			got = append(got, strings.TrimSpace(fmt.Sprint(uploader, " ", p.GetInstance(), " ", p.GetGeneration(), " ", p.GetFault())))
			if (p.GetLaggingSince() != nil) != (p.GetGeneration() < generation) || !p.GetConnected() || p.GetHeardAt() == nil || p.GetLabels()["version"] != "1.22.2" ||
				p.GetLabels()["id"] != "" || (p.GetSpiffeId() != "") != (p.GetInstance() == "own") {
				t.Errorf("%s: %v", what, p)
			}
		}
		if !slices.Equal(got, lines) || st.GetOpasLeftOut() != 0 {
			t.Errorf("%s:\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(lines, "\n"))
		}
	}
	want("at the first generation", first,
		`main alien 0 its bundle "main" is of revision "v7", which is no generation;`,
		"main empty 0 bundle_error: no signature", "spiffe own 1", "main current 1", "main renamed 1")
	second := pushPolicy(t, c)
	send("anonymous", token, status("renamed", "authz", "2", ""))
	want("at the second", second,
		"spiffe own 1", `main alien 0 its bundle "main" is of revision "v7", which is no generation;`,
		"main current 1", "main empty 0 bundle_error: no signature", "main renamed 2")
	if m := metricsOf(t, c); !strings.Contains(m, "merlon_policy_lagging_opas 4\n") || !strings.Contains(m, "merlon_ca_reporting_instances 7\n") {
		t.Error("/metrics does not count them")
	}
}

// One token can make up any number of OPAs; an answer stays small.
func TestOPAsOfAnAnswerAreBounded(t *testing.T) {
	c := startCA(t, tempDir(t))
	who := identities(t, c)
	pushPolicy(t, c)
	token := readerToken(t, c, "main", 0)
	for i := range 1003 {
		if code, _, said := do(t, who["anonymous"], "POST", c.url("/v1/status"), token, fmt.Appendf(nil, `{"labels":{"id":"i%d"},"bundles":{"main":{"active_revision":"1"}}}`, i)); code != 200 {
			t.Fatalf("%d %s", code, said)
		}
	}
	st := c.policyStatus()
	opas := slices.DeleteFunc(slices.Clone(st.GetPoints()), func(p *capb.PolicyPoint) bool { return p.GetKind() != "opa" })
	if len(opas) != 1000 || st.GetOpasLeftOut() != 3 {
		t.Errorf("%d OPAs, %d left out", len(opas), st.GetOpasLeftOut())
	}
}

func metricsOf(t *testing.T, c *testCA) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	_, _, metrics := do(t, client, "GET", "http://"+c.srv.HealthAddress().String()+"/metrics", nil, nil)
	return metrics
}

// Without a file what is uploaded is counted, and not refused: an OPA would send it
// for ever.
func TestDecisionLogsWithoutAFileAreCounted(t *testing.T) {
	c := startCA(t, tempDir(t))
	who := identities(t, c)
	body := `[{"decision_id":"d","timestamp":"2026-11-26T04:00:00Z"}]`
	if code, _, said := do(t, who["agent"], "POST", c.url("/v1/logs"), nil, []byte(body)); code != 200 {
		t.Errorf("%d %s; want 200", code, said)
	}
	if !strings.Contains(metricsOf(t, c), `merlon_ca_decision_log_events_total{outcome="dropped"} 1`) {
		t.Error("/metrics does not count it as dropped")
	}
}
