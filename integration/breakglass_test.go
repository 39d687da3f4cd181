// Everything has expired: the CA was away for longer than its root lived.

package integration_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/stage"
)

func TestEverythingHasExpiredAndComesBack(t *testing.T) {
	t.Parallel()                  // it mostly waits
	const life = 40 * time.Second // no successor is published in its first half
	d := stage.Separate(t, "trust_refresh_hint: 1s", fmt.Sprintf("root_ttl: %s", life), fmt.Sprintf("intermediate_ttl: %s", life))
	d.Entry("/me")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, d); return err })
	d.Merlon("policy", "push", "../examples/quickstart/policy")
	entries := d.Merlon("entry", "list", "-o", "json")
	root := mustBe(t, d, "active").ID
	d.CA.Kill()
	d.Agent.Kill()
	time.Sleep(life + time.Second)

	// It says what happened and what to do.
	args := d.CA.Args
	_, stderr, err := stage.Run(t.Context(), t, nil, "merlon-ca", args...)
	if err == nil || !strings.Contains(stderr, "the root ended at") || !strings.Contains(stderr, "hint: nobody trusts anything under it any more") || !strings.Contains(stderr, "-new-root") {
		t.Fatalf("the CA started again: %v\n%s", err, stderr)
	}
	d.CA = stage.Start(t, "merlon-ca", nil, append(args, "-new-root")...)
	stage.Eventually(t, "the CA answers", func() error { _, _, err := d.Try("agent", "list"); return err })
	if next := mustBe(t, d, "active").ID; next == root {
		t.Fatal("the root that has ended signs")
	}
	if got := d.Merlon("entry", "list", "-o", "json"); got != entries {
		t.Errorf("entries = %s; want %s", got, entries)
	}
	if !strings.Contains(d.CA.Log(), "another root signs from now on") {
		t.Errorf("the log does not say so: %s", d.CA.Log())
	}

	// The agent with its old trust bundle, a new token and the new root's hash.
	name := d.AgentID()[strings.LastIndex(d.AgentID(), "/")+1:]
	token := d.Token("--agent", name)
	d.StartAgent(token.Token, token.RootHash)
	stage.Eventually(t, "an SVID under the new root is served", func() error {
		own, err := fetch(t, d)
		if err == nil && own.ID.String() != d.ID("/me") {
			err = errors.New(own.ID.String())
		}
		return err
	})
	d.Merlon("policy", "push", "../examples/quickstart/policy")
}

// The flag does nothing where there is no need.
func TestNewRootIsMadeOnlyWhereTheOldOneHasEnded(t *testing.T) {
	d := stage.Separate(t)
	root := mustBe(t, d, "active").ID
	d.CA.Kill()
	d.CA = stage.Start(t, "merlon-ca", nil, append(d.CA.Args, "-new-root")...)
	stage.Eventually(t, "the CA answers", func() error { _, _, err := d.Try("agent", "list"); return err })
	if got := mustBe(t, d, "active").ID; got != root {
		t.Errorf("root = %s; want %s, which has not ended", got, root)
	}
}
