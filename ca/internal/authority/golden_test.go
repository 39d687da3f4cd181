// The profile of leaves as text. A change here changes what every peer trusts:
// review the diff like code. Rewrite with go test -update.

package authority_test

import (
	"flag"
	"testing"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/svid/forge"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestLeafProfileIsTheGoldenOne(t *testing.T) {
	a := newAuthority(t, "example.org")
	for name, req := range map[string]authority.LeafRequest{
		"leaf": request(),
		"leaf_named": request(func(r *authority.LeafRequest) {
			r.CommonName, r.DNSNames = "postgres", []string{"db.internal", "localhost"}
		}),
	} {
		leaf, err := a.Issue(req)
		if err != nil {
			t.Fatal(err)
		}
		forge.Golden(t, *update, name, forge.Dump(parse(t, leaf.DER)))
	}
}
