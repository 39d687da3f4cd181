// Which paths are too ambiguous to decide about (SECURITY.md T14).

package policy

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

func TestCheckPathAcceptsPlainPaths(t *testing.T) {
	for _, p := range []string{
		"/", "/orders", "/orders/", "/orders/1/lines", "/shop.Orders/Get", "/a.b/..c/...", "/.well-known/x", "/a/.hidden",
		"/a%20b", "/a%2Bb", "/a+b,c=d&e@f:g!$'()*", "/caf\u00e9", "/caf%C3%A9", "/caf%c3%a9", "/%E2%82%AC", "/~me/-_.",
	} {
		if err := CheckPath(p); err != nil {
			t.Errorf("CheckPath(%q) = %v; want nil", p, err)
		}
	}
}

// T14: each of these means something else to some server behind us.
func TestT14CheckPathRefusesAmbiguousPaths(t *testing.T) {
	tests := map[string]string{
		"":                "does not start",
		"*":               "does not start",
		"orders":          "does not start",
		"host:443":        "does not start",
		"http://h/orders": "does not start",
		"%2forders":       "does not start",
		"//":              "empty segment",
		"//orders":        "empty segment",
		"/a//b":           "empty segment",
		"/a//":            "empty segment",
		"/.":              `segment "."`,
		"/..":             `segment ".."`,
		"/./a":            `segment "."`,
		"/a/./b":          `segment "."`,
		"/a/../b":         `segment ".."`,
		"/a/..":           `segment ".."`,
		"/a%2fb":          "encoded '/'",
		"/a%2Fb":          "encoded '/'",
		"/a%5cb":          `encoded '\\'`,
		"/a%5Cb":          `encoded '\\'`,
		"/a%00":           "encoded control",
		"/a%0d%0ab":       "encoded control",
		"/a%7f":           "encoded control",
		"/a%252fb":        "encoded '%'",
		"/a%25":           "encoded '%'",
		"/%61dmin":        "needs no encoding",
		"/%41":            "needs no encoding",
		"/%30":            "needs no encoding",
		"/%2e%2e/a":       "needs no encoding",
		"/%2E":            "needs no encoding",
		"/%2d":            "needs no encoding",
		"/%5f":            "needs no encoding",
		"/%5F":            "needs no encoding",
		"/%7e":            "needs no encoding",
		"/%7E":            "needs no encoding",
		`/a\b`:            `character '\\'`,
		"/a;b=c":          "character ';'",
		"/..;/a":          "character ';'",
		"/a#b":            "character '#'",
		"/a?b":            "character '?'",
		"/a\x00":          "control character",
		"/a\nb":           "control character",
		"/a\tb":           "control character",
		"/a\x7f":          "control character",
		"/a\u0085b":       "control character",
		"/a%C2%85b":       "control character",
		"/a\xff":          "bad UTF-8",
		"/a%ff":           "bad UTF-8",
		"/a%c0%af":        "bad UTF-8",
		"/a%c0%ae%c0%ae/": "bad UTF-8",
		"/\xc3%a9":        "bad UTF-8",
		"/a%":             "incomplete",
		"/a%4":            "incomplete",
		"/a%zz":           "without two hex digits",
		"/a%2":            "incomplete",
		"/a%2gb":          "without two hex digits",
		"/a%u0061":        "without two hex digits",
		"/a/%":            "incomplete",
	}
	for p, want := range tests {
		err := CheckPath(p)
		if _, ok := errors.AsType[*PathError](err); !ok {
			t.Errorf("CheckPath(%q) = %v; want *PathError", p, err)
			continue
		}
		if !strings.Contains(err.Error(), want) {
			t.Errorf("CheckPath(%q) = %q; want %q in it", p, err, want)
		}
	}
}

// Every single character is either fine or refused both raw and encoded in
// upper and in lower case, as the rules say.
func TestCheckPathCoversEveryEncodedByte(t *testing.T) {
	for c := range 0x80 {
		encoded := []string{fmt.Sprintf("/%%%02x", c), fmt.Sprintf("/%%%02X", c)}
		want := c >= ' ' && c != 0x7f && !unreserved(byte(c)) && !strings.ContainsRune(`/\%`, rune(c))
		for _, p := range encoded {
			if got := CheckPath(p) == nil; got != want {
				t.Errorf("CheckPath(%q) accepts: %v; want %v", p, got, want)
			}
		}
	}
}

var (
	pathPieces = []string{"/", "a", "orders", ".", "..", "%", "%2f", "%2F", "%2e", "%20", "%c3", "%a9", "\\", ";", "é", "\xff", "\x00", "?", "#", "~", "%25", "%7f", "*"}
	anyPath    = rapid.Map(rapid.SliceOfN(rapid.SampledFrom(pathPieces), 0, 10), func(p []string) string { return "/" + strings.Join(p, "") })
)

// What is accepted is its own cleaned form, and stays so when a server
// decodes it: cleaning before or after decoding, or not at all, is the same.
func TestAcceptedPathsMeanTheSameToEveryServer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		checkAccepted(t, anyPath.Draw(t, "path"))
	})
}

func FuzzCheckPath(f *testing.F) {
	for _, s := range []string{"/", "/a%2fb", "/%c0%af", "/a/../b", "/é", "/a;b", "//"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, p string) { checkAccepted(t, p) })
}

func checkAccepted(t interface {
	Helper()
	Fatalf(string, ...any)
}, p string,
) {
	t.Helper()
	if CheckPath(p) != nil {
		return
	}
	decoded, err := url.PathUnescape(p)
	if err != nil {
		t.Fatalf("accepted %q, which does not decode: %v", p, err)
	}
	if again, err := url.PathUnescape(decoded); err == nil && again != decoded {
		t.Fatalf("accepted %q, which decodes twice", p)
	}
	if !utf8.ValidString(decoded) {
		t.Fatalf("accepted %q, which is no UTF-8 when decoded", p)
	}
	for _, s := range []string{p, decoded} {
		if c := path.Clean(s); c != strings.TrimSuffix(s, "/") && s != "/" {
			t.Fatalf("accepted %q, whose form %q cleans to %q", p, s, c)
		}
	}
	if strings.Count(decoded, "/") != strings.Count(p, "/") {
		t.Fatalf("accepted %q, which has other segments when decoded", p)
	}
}

func BenchmarkCheckPath(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if err := CheckPath("/orders/12345/lines"); err != nil {
			b.Fatal(err)
		}
	}
}

func TestDecodePath(t *testing.T) {
	for in, want := range map[string]string{
		"/": "/", "/a:b": "/a:b", "/a%3Ab": "/a:b", "/a%3ab": "/a:b", "/caf%C3%A9": "/café", "/a+b": "/a+b", "/%20": "/ ",
		"/%": "/%", "/%4": "/%4", "/%zz": "/%zz", // not of CheckPath, but no reason to panic
	} {
		if got := DecodePath(in); got != want {
			t.Errorf("DecodePath(%q) = %q; want %q", in, got, want)
		}
		if CheckPath(in) != nil {
			continue
		}
		if u, err := url.ParseRequestURI(in); err != nil || u.Path != want {
			t.Errorf("net/url reads %q as %v, %v; want %q", in, u, err, want)
		}
	}
}
