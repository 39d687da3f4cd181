// A replica that is cut off from the store renews its agents, and nobody else
// knows: the keys of the CA wait for it.

package integration_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/stage"
)

func TestReplicaCutOffFromTheStoreHoldsRotationBack(t *testing.T) {
	t.Parallel() // it waits more than it works
	settings := []string{"trust_refresh_hint: 1s", "agent_svid_ttl: 8s", "x509_svid_ttl: 4s", "jwt_svid_ttl: 4s"}
	c := stage.StartCluster(t, 1, 1, settings...)
	gate := stage.NewGate(t, c.Etcd.Endpoints()[0])
	second := c.Add([]string{gate.URL()}, settings...)
	all := c.Replicas
	c.Replicas = []*stage.Replica{second}
	c.Join() // the agent knows the second replica alone
	c.Replicas = all
	c.Entry("/me")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, c.Domain); return err })
	gate.Shut()
	c.Merlon("authority", "prepare", "--kind", "x509-root")
	// The agent's record ends, and with it what its workloads had by then: by the
	// store alone it counts no more.
	time.Sleep(8 * time.Second)
	var next stage.Authority
	stage.Eventually(t, "nobody but the replica is waited for", func() (err error) {
		if next, err = stage.AuthorityIn(c.Domain, "x509-root", "published"); err == nil && len(next.Pending.Agents) > 0 {
			err = fmt.Errorf("%v are", next.Pending.Agents)
		}
		return err
	})
	time.Sleep(4 * time.Second) // three hints
	if next, err := stage.AuthorityIn(c.Domain, "x509-root", "published"); err != nil || next.Pending.Ready || !slices.Equal(next.Pending.Silent, []string{second.ID}) {
		t.Errorf("pending = %+v, %v; want it to wait for %s", next.Pending, err, second.ID)
	}
	if _, err := fetch(t, c.Domain); err != nil {
		t.Errorf("the agent of the replica that is cut off serves nothing: %v", err)
	}
	if status := c.Merlon("authority", "status"); !strings.Contains(status, "not heard of: "+second.ID) {
		t.Errorf("status = %s; want it to name %s", status, second.ID)
	}
	if _, stderr, err := c.Try("authority", "activate", next.ID); err == nil || !strings.Contains(stderr, "replica "+second.ID) || !strings.Contains(stderr, "hint: see that the replica runs") {
		t.Errorf("activate: %v %s; want it to name %s, and what to do", err, stderr, second.ID)
	}
	gate.Open()
	// It is heard of when the store knows of its agent, which counts then.
	stage.Eventually(t, "the replica is heard of", func() error {
		now, err := stage.AuthorityIn(c.Domain, "x509-root", "published")
		switch {
		case err != nil:
			return err
		case len(now.Pending.Silent) > 0:
			return errors.New("it is not")
		case !recorded(t, c.Domain):
			t.Error("it is heard of, and the store does not know that its agent lives")
		}
		return nil
	})
	stage.Done(c.Domain, "authority", "activate", next.ID)
	stage.Eventually(t, "an SVID under the new root", func() error {
		own, err := fetch(t, c.Domain)
		if err == nil && fmt.Sprintf("%x", own.Certificates[len(own.Certificates)-1].AuthorityKeyId) != next.ID {
			err = errors.New("it is under the old root")
		}
		return err
	})
}

// recorded says whether the only agent lives, as far as its record says.
func recorded(t *testing.T, d *stage.Domain) bool {
	t.Helper()
	var agents []struct {
		NotAfter time.Time `json:"not_after"`
	}
	stage.Decode(t, d.Merlon("agent", "list", "-o", "json"), &agents)
	return len(agents) == 1 && time.Now().Before(agents[0].NotAfter)
}
