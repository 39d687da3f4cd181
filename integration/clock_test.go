// Clocks that jump by an hour. A ban, where that of the banned agent does, or of the CA:
// what decides is the store's revision in serial numbers; no date does. (CA and agent whose
// clocks are apart by as much from the start do not meet: their SVIDs live for less.)

package integration_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

func TestBanDoesNotDependOnClocks(t *testing.T) {
	if os.Getenv("MERLON_CLOCKS") == "" {
		t.Skip("sets clocks of processes, which needs root: make clocks")
	}
	for name, off := range map[string]struct{ ca, agent time.Duration }{
		"the agent is ahead":  {0, time.Hour},
		"the agent is behind": {0, -time.Hour},
		"the CA is behind":    {-time.Hour, 0},
	} {
		t.Run(name, func(t *testing.T) { banned(t, off.ca, off.agent) })
	}
}

// The same for services: what they hold, and what they let in, when their own clock
// jumps either way.
func TestServicesWhenClocksJump(t *testing.T) {
	if os.Getenv("MERLON_CLOCKS") == "" {
		t.Skip("compiles the SDK anew, which takes minutes: make clocks")
	}
	stage.TestWithJumps(t, "sdk", "Clock")
}

// banned has a workload of a node whose agent is to be banned call one of another
// node, by a CA and an agent whose clocks are off.
func banned(t *testing.T, ca, agent time.Duration) {
	// What is an hour old must not have ended.
	d := stage.CAAlone(t, "merlon-ca", nil, "x509_svid_ttl: 4h", "agent_svid_ttl: 4h")
	node := func(name string) *stage.Domain {
		token := d.Token("--agent", name)
		n := *d
		n.SetDir(stage.Dir(t))
		n.Agent = stage.Start(t, "merlon-agent", nil, "-config", n.AgentConfig(token.RootHash, "join_token: "+token.Token))
		return &n
	}
	good, bad := node("good"), node("bad")
	entryOn(t, d, "/orders", d.ID("/agent/good"))
	entryOn(t, d, "/web", d.ID("/agent/bad"))
	policy := t.TempDir()
	rule := fmt.Sprintf("grants:\n  - id: web-to-orders\n    from: [%s]\n    to: [%s]\n    http: {}\n", d.ID("/web"), d.ID("/orders"))
	if err := os.WriteFile(filepath.Join(policy, "grants.yaml"), []byte(rule), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", policy)
	url := services.Serve(t, services.Open(t, good, sdk.WithStartupTimeout(30*time.Second)), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/feed" {
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	}))
	web := &http.Client{Transport: httpauth.Transport(services.Open(t, bad, sdk.WithStartupTimeout(30*time.Second)), sdk.Service("orders"))}
	var body io.ReadCloser
	stage.Eventually(t, "the stream opens", func() error {
		resp, err := web.Get(url + "/feed")
		if err != nil {
			return err
		}
		if body = resp.Body; resp.StatusCode != http.StatusOK {
			return errors.Join(errors.New(resp.Status), body.Close())
		}
		return nil
	})
	defer body.Close()
	cut := make(chan error, 1)
	go func() { _, err := io.Copy(io.Discard, body); cut <- err }()

	stage.SetClock(t, d.CA.PID(), ca)
	stage.SetClock(t, bad.Agent.PID(), agent)
	select {
	case err := <-cut:
		t.Fatalf("the stream was cut before the ban: %v", err)
	case <-time.After(5 * time.Second):
	}
	d.Merlon("agent", "ban", d.ID("/agent/bad"))
	select {
	case <-cut:
	case <-time.After(30 * time.Second):
		t.Error("the stream of the banned node's workload was not cut")
	}
	stage.Eventually(t, "what the banned node holds is refused", func() error {
		if got := services.Reason(web, url+"/again"); !strings.Contains(got, "bad certificate") && got != "REVOKED" {
			return fmt.Errorf("it is answered %q", got)
		}
		return nil
	})
	// It is told; or it takes the CA for one whose SVID is not valid, and stays out.
	refusals := func() int {
		log := bad.Agent.Log()
		return strings.Count(log, "the agent is banned") + strings.Count(log, "no connection to the CA")
	}
	isOut := func(what string, after int) {
		stage.Eventually(t, what, func() error {
			if refusals() <= after {
				return errors.New(bad.Agent.Log())
			}
			return nil
		})
	}
	isOut("the banned agent is out", 0)
	before := refusals()
	bad.Agent.Restart()
	isOut("it is not let in after its restart", before)
	if out := d.Merlon("agent", "show", d.ID("/agent/bad"), "-o", "json"); !strings.Contains(out, `"state": "banned"`) || strings.Contains(out, `"connected": true`) {
		t.Errorf("the banned agent is back: %s", out)
	}
}
