// A node without its CA: what goes on, from outside, with real processes that
// are killed.

package integration_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/seal"
)

// onAgentDisk opens one of the agent's sealed files.
func onAgentDisk(d *stage.Domain, name string) ([]byte, error) {
	key, err := seal.Read(seal.Source{}, d.AgentData())
	if err != nil {
		return nil, err
	}
	sealed, err := os.ReadFile(filepath.Join(d.AgentData(), name+".sealed"))
	if err != nil {
		return nil, err
	}
	return key.Open(sealed, "merlon agent file", d.TrustDomain, name)
}

// kept waits until the agent's cache holds text.
func kept(t *testing.T, d *stage.Domain, text string) {
	t.Helper()
	stage.Eventually(t, "the cache holds "+text, func() error {
		content, err := onAgentDisk(d, "cache")
		if err == nil && !bytes.Contains(content, []byte(text)) {
			err = errors.New("not yet")
		}
		return err
	})
}

func same(a, b *x509svid.SVID) bool {
	return a.Certificates[0].SerialNumber.Cmp(b.Certificates[0].SerialNumber) == 0
}

// The CA is dead, then the agent is: restarted it serves the same SVIDs, from
// the cache, and a policy; when the CA is back everything goes on.
func TestKilledAgentServesAgainWithoutTheCA(t *testing.T) {
	d := stage.Separate(t)
	d.Entry("/me", "--ttl", "1h")
	d.Merlon("policy", "push", "../examples/quickstart/policy")
	var before *x509svid.SVID
	stage.Eventually(t, "an SVID is served", func() (err error) {
		before, err = fetch(t, d)
		return err
	})
	token, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "db"}, workloadapi.WithAddr(d.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	kept(t, d, token.Marshal())
	d.CA.Kill()
	for range 2 {
		d.Agent.Kill()
		began := time.Now()
		d.Agent.Restart()
		var after *x509svid.SVID
		stage.Eventually(t, "an SVID is served again", func() (err error) {
			after, err = fetch(t, d)
			return err
		})
		t.Logf("served %v after the start of the process", time.Since(began).Round(time.Millisecond))
		if !same(before, after) {
			t.Error("another SVID is served")
		}
		if again, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "db"}, workloadapi.WithAddr(d.WorkloadAPI)); err != nil || again.Marshal() != token.Marshal() {
			t.Errorf("FetchJWTSVID = %v; want the one from before", err)
		}
		if !strings.Contains(d.Agent.Log(), "policy active") {
			t.Errorf("no policy from the disk: %s", d.Agent.Log())
		}
	}
	stream := watchSVIDs(t, d)
	d.CA.Restart()
	stage.Eventually(t, "the CA answers again", func() error {
		_, _, err := d.Try("agent", "list")
		return err
	})
	d.Entry("/second")
	stream.expect(t, d.ID("/second"))
}

// A cache with one flipped byte is evidence, and nothing else.
func TestDamagedCacheIsSetAside(t *testing.T) {
	d := stage.Separate(t)
	d.Entry("/me")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, d); return err })
	kept(t, d, `"svids":[{`)
	d.Agent.Kill()
	path := filepath.Join(d.AgentData(), "cache.sealed")
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	content[len(content)/3] ^= 0x20
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	d.Agent.Restart()
	stage.Eventually(t, "an SVID is served again", func() error { _, err := fetch(t, d); return err })
	aside, err := filepath.Glob(path + ".set-aside-*")
	if err != nil || len(aside) != 1 {
		t.Fatalf("set aside: %q, %v", aside, err)
	}
	evidence, err := os.ReadFile(aside[0])
	if err != nil || !bytes.Equal(evidence, content) {
		t.Errorf("the evidence is not what lay there (%v)", err)
	}
	if !strings.Contains(d.Agent.Log(), aside[0]) {
		t.Errorf("the log does not name %s: %s", aside[0], d.Agent.Log())
	}
}

// The agent's own SVID ends while the CA is dead, and the agent is killed too:
// workloads keep theirs, and with the CA back everything goes on by itself,
// although the join token is used up.
func TestAgentComesBackAfterItsSVIDEnded(t *testing.T) {
	d := stage.Separate(t, "agent_svid_ttl: 3s")
	d.Entry("/me", "--ttl", "1h")
	var before *x509svid.SVID
	stage.Eventually(t, "an SVID is served", func() (err error) {
		before, err = fetch(t, d)
		return err
	})
	kept(t, d, `"svids":[{`)
	stream := watchSVIDs(t, d)
	d.CA.Kill()
	time.Sleep(3 * time.Second)
	if after, err := fetch(t, d); err != nil || !same(before, after) {
		t.Errorf("with its own SVID ended the agent serves %v, %v; want the SVID from before", after, err)
	}
	d.CA.Restart()
	stage.Eventually(t, "the CA answers again", func() error {
		_, _, err := d.Try("agent", "list")
		return err
	})
	d.Entry("/second")
	stream.expect(t, d.ID("/second"))
	if n := strings.Count(d.Agent.Log(), "agent came back by its own SVID"); n != 1 {
		t.Errorf("the agent came back %d times: %s", n, d.Agent.Log())
	}

	d.CA.Kill()
	d.Agent.Kill()
	time.Sleep(3 * time.Second)
	d.Agent.Restart()
	stage.Eventually(t, "the SVID from before is served", func() error {
		after, err := fetch(t, d)
		if err == nil && !same(before, after) {
			err = errors.New("another")
		}
		return err
	})
	stream = watchSVIDs(t, d)
	d.CA.Restart()
	stage.Eventually(t, "the CA answers again", func() error {
		_, _, err := d.Try("agent", "list")
		return err
	})
	d.Entry("/third")
	stream.expect(t, d.ID("/third"))
}

// What an operator sees of it: the outage budget, and exit status 3 where the
// node is not well or something ends too soon.
func TestDoctorShowsTheOutageBudget(t *testing.T) {
	d := stage.Separate(t)
	d.Entry("/me", "--ttl", "1h")
	d.Merlon("policy", "push", "../examples/quickstart/policy")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, d); return err })
	kept(t, d, `"svids":[{`)
	doctor := func(args ...string) (out doctorReport, code int) {
		t.Helper()
		stdout, stderr, err := stage.Run(t.Context(), t, []string{"MERLON_ADMIN=" + d.AgentAdmin}, "merlon", append([]string{"doctor", "-o", "json"}, args...)...)
		if exit := new(exec.ExitError); errors.As(err, &exit) {
			code = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		if stdout == "" {
			t.Fatalf("merlon doctor: %s", stderr)
		}
		stage.Decode(t, stdout, &out)
		return out, code
	}
	out, code := doctor()
	b := out.Budget
	if code != 0 || !out.Healthy || b.X509SVIDs != 1 || time.Until(b.First) < 55*time.Minute || !b.First.Equal(b.Median) || b.Policy != 1 || !b.SurvivesRestart || b.OwnSVID.IsZero() {
		t.Errorf("exit status %d, %+v", code, out)
	}
	if out, code := doctor("--fail-if-expiring", "2h"); code != 3 || out.Healthy {
		t.Errorf("with an SVID that ends within 2 h: exit status %d, %+v", code, out)
	}
	d.CA.Kill()
	stage.Eventually(t, "the doctor sees that the CA is away", func() error {
		out, code := doctor()
		if code != 3 || out.failing() != "ca" {
			return fmt.Errorf("exit status %d, failing %q", code, out.failing())
		}
		return nil
	})
}

// doctorReport is `merlon doctor -o json`.
type doctorReport struct {
	Healthy bool `json:"healthy"`
	Budget  struct {
		X509SVIDs       int       `json:"x509_svids"`
		First           time.Time `json:"first_x509_svid_not_after"`
		Median          time.Time `json:"median_x509_svid_not_after"`
		Policy          int       `json:"policy_generation"`
		OwnSVID         time.Time `json:"own_svid_not_after"`
		SurvivesRestart bool      `json:"survives_restart"`
	} `json:"outage_budget"`
	Checks []struct {
		Name string `json:"name"`
		OK   bool   `json:"ok"`
	} `json:"checks"`
}

func (r doctorReport) failing() string {
	var names []string
	for _, c := range r.Checks {
		if !c.OK {
			names = append(names, c.Name)
		}
	}
	return strings.Join(names, " ")
}
