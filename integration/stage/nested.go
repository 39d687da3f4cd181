// A trust domain with a second CA below the first, which has a store of its own.

package stage

import "testing"

// Below starts a CA that is nested below d's under the given name, with further
// lines of its configuration, and an agent of its own.
func (d *Domain) Below(tb testing.TB, name string, settings ...string) *Domain {
	tb.Helper()
	token := d.Token("--kind", "nested-ca", "--name", name)
	n := CAAlone(tb, d.binary, nil, append(settings,
		"upstream: merlon", "upstream_address: "+d.GRPC, "join_token: "+token.Token, "root_hash: "+token.RootHash)...)
	join := n.Token()
	n.StartAgent(join.Token, join.RootHash)
	n.agentID = join.AgentID
	n.AgentServes()
	return n
}
