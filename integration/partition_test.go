// A CA of several replicas on a network that breaks: machines are cut off from
// each other, and no packet says so.

package integration_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
)

func TestWhatIsCutOffIsLeft(t *testing.T) {
	t.Parallel() // it waits more than it works
	if !stage.InNamespace(t) {
		return
	}
	n := stage.NewNetwork(t)
	c := n.StartCluster(3, 2)
	c.Join()
	c.Entry("/me", "--ttl", "6s")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, c.Domain); return err })
	stream := watchSVIDs(t, c.Domain)
	stream.expect(t, c.ID("/me"))

	// The replica keeps its agent, and loses its store.
	cut := c.Serving()
	left := c.Other(cut)
	for _, m := range c.Etcd.Members {
		n.Cut(cut.Space, m.Space)
	}
	stage.Eventually(t, cut.ID+" says that it cannot reach its store", func() error {
		if err := cut.Ready(); err == nil || !strings.Contains(err.Error(), "store") {
			return fmt.Errorf("its readiness is %v", err)
		}
		return nil
	})
	_, refusal, err := c.By(cut).Try("entry", "create", "--spiffe-id", c.ID("/refused"), "--selector", "unix:uid:0", "--parent", c.AgentID())
	if err == nil || !strings.Contains(refusal, "store") {
		t.Errorf("a write to the replica without a store: %v, %s; want a refusal that says so", err, refusal)
	}
	c.By(left).Entry("/after-store")
	stream.expect(t, c.ID("/after-store"))
	stream.renewals(t, 3)
	if now := c.Serving(); now != left {
		t.Errorf("the agent follows %s; want %s", now.ID, left.ID)
	}
	n.Heal(cut.Space)
	stage.Eventually(t, cut.ID+" is back", cut.Ready)
	stage.Eventually(t, "both list the same entries", func() error {
		if got, want := c.By(cut).Merlon("entry", "list", "-o", "json"), c.By(left).Merlon("entry", "list", "-o", "json"); got != want || strings.Contains(got, "/refused") {
			return fmt.Errorf("%s lists %s; want %s", cut.ID, got, want)
		}
		return nil
	})

	// The replica that is followed now loses everybody.
	n.Partition(left.Space)
	c.By(cut).Entry("/after-replica")
	stream.expect(t, c.ID("/after-replica"))
	stream.renewals(t, 3)
	n.Heal(left.Space)
	stage.Eventually(t, left.ID+" is back", left.Ready)

	// The leader of etcd loses everybody; a write is asked of each replica.
	leader := c.Etcd.Leader()
	n.Partition(leader.Space)
	for i, r := range c.Replicas {
		path := fmt.Sprintf("/after-leader-%d", i)
		stage.Eventually(t, "writes go on with two of three members", func() error {
			_, stderr, err := c.By(r).Try("entry", "create", "--spiffe-id", c.ID(path), "--selector", "unix:uid:0", "--parent", c.AgentID())
			if err != nil {
				return fmt.Errorf("%w: %s", err, stderr)
			}
			return nil
		})
		stream.expect(t, c.ID(path))
	}
	stream.renewals(t, 3)
	n.Heal(leader.Space)
	stage.Eventually(t, "the member that led follows", func() error {
		if now := c.Etcd.Leader(); now == leader {
			return errors.New("it still takes itself for the leader")
		}
		return nil
	})
}
