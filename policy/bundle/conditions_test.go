package bundle

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

// What a client writes into Prefer and If-None-Match waits no longer than a header can
// say, ends, and never matches a tag that is not there.
func FuzzConditions(f *testing.F) {
	for _, s := range []string{
		`"a"`, `W/"a", "b,c"`, "*", `modes=snapshot,delta;wait=10`, `wait="5"`, "wait=99999999999", "wait=-1", `"a`, ",,,", `"a""b"`, "",
	} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, prefer, match string) {
		if wait := preferredWait(http.Header{"Prefer": {prefer}}); wait < 0 || wait > 1<<31*time.Second || wait > 0 && !strings.Contains(strings.ToLower(prefer), "wait") {
			t.Fatalf("Prefer: %q waits %s", prefer, wait)
		}
		const tag = `"generation-5"`
		if matches(http.Header{"If-None-Match": {match}}, tag) && !strings.Contains(match, tag) && !strings.Contains(match, "*") {
			t.Fatalf("If-None-Match: %q matches %s", match, tag)
		}
		if !matches(http.Header{"If-None-Match": {tag + ", " + match}}, tag) {
			t.Fatalf("%s is not found before %q", tag, match)
		}
	})
}
