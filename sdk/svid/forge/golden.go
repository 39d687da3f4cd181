// Golden files: a text that is reviewed once, and then held against.

package forge

import (
	"os"
	"path/filepath"

	"github.com/google/go-cmp/cmp"
)

// GoldenTB is what Golden needs of a test.
type GoldenTB interface {
	TB
	Errorf(format string, args ...any)
}

// Golden holds got against testdata/NAME.golden, or writes it there on update.
func Golden(t GoldenTB, update bool, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil { //nolint:gosec // a source file
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s is not the golden one (-want +got):\n%s", name, diff)
	}
}
