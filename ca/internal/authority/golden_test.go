// The profile of leaves as text. A change here changes what every peer trusts:
// review the diff like code. Rewrite with go test -update.

package authority_test

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

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
		golden(t, name, forge.Dump(parse(t, leaf.DER)))
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("profile %s changed (-want +got):\n%s", name, diff)
	}
}
