// A CA of replicas whose store is restored with a loss: no replica comes back,
// and what they signed counts no more, or is signed anew.

package ca_test

import (
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/offline"
	"merlon.dev/integration/stage"
)

func TestReplicasDoNotComeBackWithALossyRestore(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	dir := tempDir(t)
	a := startCA(t, dir, onEtcd(e))
	b := startCA(t, tempDir(t), onEtcd(e), a.joining("ca-2"))
	agent := a.agent("n1")
	a.entry("n1", "x")
	until(t, agent.at(b).sync(0), synced)
	operator := a.admins(agent.at(b), "boss", capb.Role_ROLE_OPERATOR, "") // by an SVID that ca-2 issued
	if _, err := operator.admin.ListEntries(t.Context(), &capb.ListEntriesRequest{}); err != nil {
		t.Fatal(err)
	}
	generation := pushPolicy(t, b)
	gone := a.replicas()["ca-2"]
	a.stop()
	b.stop()

	restored := func(cfg *ca.Config) { onEtcd(e)(cfg); cfg.EtcdPrefix = "/restored/" }
	cfg := ca.Config{TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "s", "a.sock")}
	restored(&cfg)
	file := filepath.Join(dir, "backup")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	from := cfg
	onEtcd(e)(&from)
	from.EtcdPrefix = ""
	if _, err := offline.Backup(t.Context(), from, f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := offline.Restore(t.Context(), cfg, file, offline.RestoreOptions{AcceptLoss: true}); err != nil {
		t.Fatal(err)
	}

	a = startCA(t, dir, restored)
	if n := len(a.replicas()); n != 1 {
		t.Errorf("%d replicas; want the root holder", n)
	}
	_, err = a.client(operator.key, operator.chain).admin.ListEntries(t.Context(), &capb.ListEntriesRequest{})
	wantCode(t, err, codes.Unauthenticated)
	revoked := make(map[string]bool)
	list, err := a.admin.ListRevocations(t.Context(), &capb.ListRevocationsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range list.GetRevocations() {
		revoked[r.GetAuthorityId()] = r.GetBeforeRevision() == 0
	}
	if !revoked[gone.GetAuthorityId()] || !revoked[gone.GetJwtKeyId()] {
		t.Errorf("revoked %v; want %s and %s for good", revoked, gone.GetAuthorityId(), gone.GetJwtKeyId())
	}
	var policy *capb.GetPolicyResponse
	eventually(t, "the policy has a generation of the next epoch", func() bool {
		policy, err = a.admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{})
		return err == nil && policy.GetPolicyBundle().GetGeneration() > generation
	})
	if keys := policy.GetPolicyBundle().GetKeys(); len(keys) != 1 || keys[0].GetKid() == gone.GetPolicyKeyId() {
		t.Errorf("policy keys %v; want the root holder's", keys)
	}
	if !verifies(t, a, policy.GetPolicyBundle()) {
		t.Error("the policy that the replica had signed does not verify any more")
	}
	generation = policy.GetPolicyBundle().GetGeneration()
	a.stop()
	a = startCA(t, dir, restored)
	if policy, err := a.admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{}); err != nil || policy.GetPolicyBundle().GetGeneration() != generation {
		t.Errorf("after the next start: %v, %v; want generation %d still", policy, err, generation)
	}
}
