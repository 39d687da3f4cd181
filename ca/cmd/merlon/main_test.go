// Mistakes that testscript cannot type.

package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestTextThatIsNotUTF8IsRefusedByName(t *testing.T) {
	var out, stderr bytes.Buffer
	code := run(t.Context(), []string{"entry", "create", "--spiffe-id", "spiffe://a.test/\xff", "--selector", "unix:uid:1"}, &out, &stderr)
	if want := `--spiffe-id "spiffe://a.test/\xff" is not valid UTF-8`; code != exitUsage || !strings.Contains(stderr.String(), want) || !strings.Contains(stderr.String(), "hint: ") {
		t.Errorf("exit code %d, %q; want %d, %q and a hint", code, stderr.String(), exitUsage, want)
	}
}
