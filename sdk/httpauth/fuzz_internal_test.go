// Bytes from the network: request targets at the server, denials at the
// client.

package httpauth

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"merlon.dev/policy"
)

// What passes is what was sent, and decodes to what handlers see.
func FuzzExactPath(f *testing.F) {
	for _, seed := range []string{"/", "/a/b?c=d", "/a%20b/%C3%A9", "//a", "/a/../b", "*", "http://h/a", "/a#b", "/a?b#c", "/%2f", "/a;b", "?", "/é", "/a%"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, target string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET " + target + " HTTP/1.1\r\nHost: h\r\n\r\n")))
		if err != nil {
			return
		}
		path, err := exactPath(r)
		if err != nil {
			return
		}
		if err := policy.CheckPath(path); err != nil {
			t.Fatal(err)
		}
		if sent, _, _ := strings.Cut(r.RequestURI, "?"); path != sent {
			t.Errorf("%q: the policy sees %q; sent was %q", target, path, sent)
		}
		if decoded, err := url.PathUnescape(path); err != nil || decoded != r.URL.Path {
			t.Errorf("%q: the policy sees %q; the handler sees %q", target, path, r.URL.Path)
		}
	})
}

// A denial has every mark of one; any other answer keeps its body.
func FuzzDenial(f *testing.F) {
	f.Add(403, "application/problem+json", "abc", []byte(`{"type":"https://merlon.dev/problems/denied","reason":"NO_GRANT","decision_id":"abc","hint":"h"}`))
	f.Add(400, "application/problem+json; charset=utf-8", "abc", []byte(`{"type":"https://merlon.dev/problems/denied","reason":"\u001b","decision_id":"abc"}`))
	f.Add(403, "application/problem+json", "abc", []byte(`{"type":"about:blank","decision_id":"abc"}`))
	f.Add(200, "text/plain", "", []byte("hi"))
	f.Fuzz(func(t *testing.T, status int, contentType, decision string, body []byte) {
		res := &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body))}
		res.Header.Set("Content-Type", contentType)
		res.Header.Set(DecisionIDHeader, decision)
		denied := denialOf(res)
		if denied != nil {
			if denied.DecisionID != decision || decision == "" || status < 400 {
				t.Errorf("denial %+v of %d with decision %q", denied, status, decision)
			}
			if strings.ContainsAny(denied.Error(), "\n\r\x1b\u2028") {
				t.Errorf("Error() = %q", denied.Error())
			}
			return
		}
		if kept, err := io.ReadAll(res.Body); err != nil || !bytes.Equal(kept, body) {
			t.Errorf("the body %q became %q, %v", body, kept, err)
		}
	})
}
