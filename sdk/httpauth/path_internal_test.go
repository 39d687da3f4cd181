// The decision refuses ambiguous paths, too (sdk/authorize.go), so that no test through
// it would see that this package had stopped to.

package httpauth

import (
	"net/http"
	"net/url"
	"testing"
)

func TestT14ExactPathRefusesByItself(t *testing.T) {
	asked := func(method, target string, changed ...string) *http.Request {
		r := &http.Request{Method: method, RequestURI: target, Host: "orders", Header: http.Header{}, URL: &url.URL{}}
		for _, text := range append(changed, target)[:1] {
			if u, err := url.ParseRequestURI(text); err == nil {
				r.URL = u
			}
		}
		return r
	}
	hosts := asked("GET", "/a")
	hosts.Header["Host"] = []string{"other"}
	for name, r := range map[string]*http.Request{
		"an empty segment":     asked("GET", "/a//b"),
		"two dots":             asked("GET", "/a/../b"),
		"an encoded slash":     asked("GET", "/a%2fb"),
		"an encoded letter":    asked("GET", "/%61"),
		"a backslash":          asked("GET", `/a\b`),
		"a parameter":          asked("GET", "/a;b"),
		"absolute-form":        asked("GET", "http://orders/a"),
		"a star":               asked("OPTIONS", "*"),
		"no path":              asked("GET", ""),
		"a fragment":           asked("GET", "/a?b#c"),
		"CONNECT":              asked("CONNECT", "/a"),
		"a URL that is not it": asked("GET", "/a", "/b"),
		"another query":        asked("GET", "/a?b", "/a?c"),
		"another Host":         hosts,
	} {
		if path, err := exactPath(r); err == nil {
			t.Errorf("%s: %q is taken", name, path)
		}
	}
	if path, err := exactPath(asked("GET", "/a/b?c")); err != nil || path != "/a/b" {
		t.Errorf("exactPath = %q, %v; want /a/b", path, err)
	}
}
