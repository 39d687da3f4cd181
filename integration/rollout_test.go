// A policy's rollout on the real binaries: in shadow, as a canary that is paused
// because it denies too much, as one that is well, in force, and rolled back; with the
// CA and the agent killed on the way.

package integration_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
)

// statusOf is what the tests read of `merlon policy status -o json`.
type statusOf struct {
	Name       string `json:"name"`
	Generation uint64 `json:"generation"`
	Candidate  *struct {
		Generation uint64 `json:"generation"`
		Stage      string `json:"stage"`
		Alarm      *struct {
			Destination     string `json:"destination"`
			Allowed, Denied uint64
		} `json:"alarm"`
	} `json:"candidate"`
	Comparisons []struct {
		Destination string `json:"destination"`
		DecidedBy   string `json:"decided_by"`
		BothAllow   uint64 `json:"both_allow"`
		WouldAllow  uint64 `json:"would_allow"`
		WouldDeny   uint64 `json:"would_deny"`
	} `json:"comparisons"`
	Differences []struct {
		Source          string `json:"source"`
		Destination     string `json:"destination"`
		Would           string `json:"would"`
		RuleID          string `json:"rule_id"`
		CandidateReason string `json:"candidate_reason"`
		Calls           uint64 `json:"calls"`
	} `json:"differences"`
	Points []struct {
		Kind         string     `json:"kind"`
		SPIFFEID     string     `json:"spiffe_id"`
		PID          int        `json:"pid"`
		Connected    bool       `json:"connected"`
		Replica      string     `json:"replica"`
		Generation   uint64     `json:"generation"`
		Candidate    uint64     `json:"candidate_generation"`
		LaggingSince *time.Time `json:"lagging_since"`
		Fault        string     `json:"fault"`
		Uploader     string     `json:"uploader"`
		Labels       map[string]string
	} `json:"points"`
}

func rolloutStatus(t *testing.T, d *stage.Domain) statusOf {
	t.Helper()
	var all []statusOf
	stage.Decode(t, d.Merlon("policy", "status", "--lag-bound", "1h", "-o", "json"), &all)
	if len(all) != 1 {
		t.Fatalf("%d policy bundles: %+v", len(all), all)
	}
	return all[0]
}

// policyFolder is a policy that allows /me to send these methods to itself.
func policyFolder(t *testing.T, d *stage.Domain, methods string) string {
	t.Helper()
	dir := t.TempDir()
	text := fmt.Sprintf("grants:\n  - id: me-to-me\n    from: [%[1]s]\n    to: [%[1]s]\n    http: {methods: [%[2]s]}\n", d.ID("/me"), methods)
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// generation answers with the generation that decided the call.
func generation(w http.ResponseWriter, r *http.Request) {
	d, _ := sdk.DecisionFromContext(r.Context())
	fmt.Fprint(w, d.Revision)
}

// decidedBy is the generation that allowed a call; 0 where it was denied.
func decidedBy(c *http.Client, method, url string) (n uint64) {
	req, err := http.NewRequest(method, url, nil) //nolint:noctx // the client's
	if err != nil {
		return 0
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode == http.StatusOK {
		fmt.Sscan(string(body), &n)
	}
	return n
}

func TestPolicyRollout(t *testing.T) {
	d := stage.Separate(t, "canary_min_calls: 20")
	id := me(t, d)
	url := services.Serve(t, id, http.HandlerFunc(generation)) + "/a"
	c := client(t, id)
	d.Merlon("policy", "push", policyFolder(t, d, "GET"))
	decides := func(what, method string, want uint64) {
		t.Helper()
		stage.Eventually(t, what, func() error {
			if got := decidedBy(c, method, url); got != want {
				return fmt.Errorf("%s is decided by %d; want %d", method, got, want)
			}
			return nil
		})
	}
	status := func(what string, check func(s statusOf) bool) {
		t.Helper()
		stage.Eventually(t, what, func() error {
			if s := rolloutStatus(t, d); !check(s) {
				return fmt.Errorf("%+v", s)
			}
			return nil
		})
	}
	decides("the first policy", "GET", 1)

	// In shadow it decides nothing, and what it would have done is counted.
	d.Merlon("policy", "push", policyFolder(t, d, "POST"), "--candidate")
	status("agent and process have the candidate", func(s statusOf) bool {
		return len(s.Points) == 2 && s.Points[0].Candidate == 2 && s.Points[0].Generation == 1 &&
			s.Points[1].Kind == "process" && s.Points[1].SPIFFEID == d.ID("/me") && s.Points[1].PID == os.Getpid() && s.Points[1].Generation == 1 &&
			s.Points[1].LaggingSince == nil
	})
	for range 30 {
		if got := decidedBy(c, "GET", url); got != 1 {
			t.Fatalf("in shadow a call was decided by %d", got)
		}
		if got := decidedBy(c, "POST", url); got != 0 {
			t.Fatalf("in shadow the candidate allowed a call, generation %d", got)
		}
	}
	status("differences are counted", func(s statusOf) bool {
		var allow, deny uint64
		for _, x := range s.Differences {
			if x.Source != d.ID("/me") || x.Destination != d.ID("/me") {
				return false
			}
			switch {
			case x.Would == "deny" && x.RuleID == "me-to-me" && x.CandidateReason == "METHOD":
				deny += x.Calls
			case x.Would == "allow" && x.CandidateReason == "ALLOWED":
				allow += x.Calls
			}
		}
		return allow == 30 && deny >= 30 && len(s.Comparisons) == 1 && s.Comparisons[0].DecidedBy == "active" && s.Candidate.Stage == "shadow" && s.Candidate.Alarm == nil
	})

	// As a canary it decides, denies too much, and is paused; the policy in force is not
	// touched.
	d.Merlon("policy", "canary", "--destination", d.ID("/me"))
	decides("the canary decides", "POST", 2)
	status("the alarm", func(s statusOf) bool {
		decidedBy(c, "GET", url)
		return s.Generation == 1 && s.Candidate.Stage == "shadow" && s.Candidate.Alarm != nil && s.Candidate.Alarm.Denied >= 20 && s.Candidate.Alarm.Destination == d.ID("/me")
	})
	decides("the policy in force decides again", "GET", 1)
	decides("what the canary allowed", "POST", 0)
	alarms := func() int { return strings.Count(d.CA.Log(), "canary paused") }
	if n := alarms(); n != 1 {
		t.Errorf("%d alarms in the log; want 1", n)
	}
	caBack := func() {
		t.Helper()
		d.CA.Restart()
		stage.Eventually(t, "the CA is back", func() error { _, _, err := d.Try("policy", "status", "--lag-bound", "1h"); return err })
	}
	d.CA.Kill()
	caBack()
	before := alarms()
	for range 30 {
		decidedBy(c, "GET", url)
	}
	status("the alarm is remembered and counts go on", func(s statusOf) bool {
		return s.Candidate != nil && s.Candidate.Alarm != nil && s.Candidate.Stage == "shadow" && len(s.Comparisons) == 1 && s.Comparisons[0].WouldDeny >= 30
	})
	if n := alarms(); n != before {
		t.Errorf("the alarm was raised again after a restart")
	}

	// A better candidate takes its place, and stays a canary while agent and CA are away.
	d.Merlon("policy", "push", policyFolder(t, d, "GET, POST"), "--candidate")
	d.Merlon("policy", "canary", "--percent", "100")
	decides("the better candidate", "POST", 3)
	d.CA.Kill()
	d.Agent.Kill()
	if got := decidedBy(c, "POST", url); got != 3 {
		t.Errorf("without agent and CA a call is decided by %d", got)
	}
	d.Agent.Restart()
	stage.Eventually(t, "the agent is back, by what it kept", func() error {
		if !strings.Contains(d.Agent.Log(), "candidate_revision=3") {
			return fmt.Errorf("the log does not name the candidate")
		}
		return nil
	})
	decides("the canary that the agent kept", "POST", 3)
	caBack()
	status("no alarm", func(s statusOf) bool {
		return s.Candidate != nil && s.Candidate.Alarm == nil && s.Candidate.Stage == "canary" && s.Points[0].Connected
	})

	// In force, and back.
	d.Merlon("policy", "promote", "--generation", "3")
	decides("promoted", "POST", 4)
	if s := rolloutStatus(t, d); s.Generation != 4 || s.Candidate != nil {
		t.Errorf("promoted: %+v", s)
	}
	d.Merlon("policy", "rollback")
	decides("rolled back", "POST", 0)
	decides("rolled back", "GET", 5)

	// An agent that is away lags until it is back.
	lags := func(bound string) int {
		_, _, err := d.Try("policy", "status", "--lag-bound", bound)
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			return exit.ExitCode()
		}
		return 0
	}
	d.Agent.Kill()
	d.Merlon("policy", "rollback", "--to", "4")
	if s := rolloutStatus(t, d); s.Generation != 6 || s.Points[0].LaggingSince == nil || s.Points[0].Generation != 5 {
		t.Errorf("the agent is away: %+v", s)
	}
	if now, later := lags("0s"), lags("1h"); now != 3 || later != 0 {
		t.Errorf("exit status %d, and %d within an hour; want 3 and 0", now, later)
	}
	d.Agent.Restart()
	decides("the agent is back", "POST", 6)
	stage.Eventually(t, "nothing lags", func() error {
		if code := lags("0s"); code != 0 {
			return fmt.Errorf("exit status %d", code)
		}
		return nil
	})
}

// A hot loop of calls while the candidate comes, decides, goes and is promoted: every
// answer is one that its generation gives.
func TestNoDecisionIsOfTwoGenerations(t *testing.T) {
	d := stage.Dev(t)
	id := me(t, d)
	url := services.Serve(t, id, http.HandlerFunc(generation)) + "/a"
	c := client(t, id)
	// Odd generations allow GET only, even ones POST only.
	folders := []string{policyFolder(t, d, "POST"), policyFolder(t, d, "GET")}
	d.Merlon("policy", "push", folders[1])
	services.WantReason(t, "the first policy", c, url, "200 OK")
	done := make(chan struct{})
	var calls sync.WaitGroup
	var mu sync.Mutex
	seen := map[uint64]int{}
	for _, method := range []string{"GET", "POST"} {
		calls.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				n := decidedBy(c, method, url)
				mu.Lock()
				if seen[n]++; n != 0 && (method == "GET") != (n%2 == 1) {
					t.Errorf("generation %d allowed %s", n, method)
				}
				mu.Unlock()
			}
		})
	}
	generation := 1
	for range 4 {
		generation++
		d.Merlon("policy", "push", folders[generation%2], "--candidate")
		d.Merlon("policy", "canary", "--destination", d.ID("/me"))
		if generation%2 == 0 {
			d.Merlon("policy", "pause")
			d.Merlon("policy", "abort")
			continue
		}
		d.Merlon("policy", "abort")
	}
	close(done)
	calls.Wait()
	t.Logf("calls by generation: %v", seen)
	if seen[1] == 0 || len(seen) < 3 {
		t.Errorf("calls by generation: %v; want some of several", seen)
	}
}
