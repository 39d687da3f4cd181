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

// Without a file what is uploaded is counted, and not refused: an OPA would send it
// for ever.
func TestDecisionLogsWithoutAFileAreCounted(t *testing.T) {
	c := startCA(t, tempDir(t))
	who := identities(t, c)
	body := `[{"decision_id":"d","timestamp":"2026-11-26T04:00:00Z"}]`
	if code, _, said := do(t, who["agent"], "POST", c.url("/v1/logs"), nil, []byte(body)); code != 200 {
		t.Errorf("%d %s; want 200", code, said)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	_, _, metrics := do(t, client, "GET", "http://"+c.srv.HealthAddress().String()+"/metrics", nil, nil)
	if !strings.Contains(metrics, `merlon_ca_decision_log_events_total{outcome="dropped"} 1`) {
		t.Error("/metrics does not count it as dropped")
	}
}
