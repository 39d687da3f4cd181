// The short way of reading an entry against the long one.

package entry

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/role"
)

func sameEntry(a, b *Entry) string {
	return cmp.Diff(a, b, cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }), cmpopts.EquateEmpty())
}

// agree fails unless what cut reads is what encoding/json reads.
func agree(t testing.TB, d *Decoder, b []byte) (short bool) {
	t.Helper()
	e := d.cut(b)
	if e == nil {
		return false
	}
	want, err := decodeJSON(b)
	if err != nil {
		t.Fatalf("cut(%q) = %+v; encoding/json refuses it: %v", b, e, err)
	}
	if diff := sameEntry(want, e); diff != "" {
		t.Fatalf("cut(%q) differs (-want +got):\n%s", b, diff)
	}
	return true
}

func TestBothWaysOfDecodingAgree(t *testing.T) {
	var d Decoder
	rapid.Check(t, func(rt *rapid.T) {
		b, err := Encode(genEntry.Draw(rt, "entry"))
		if err != nil {
			rt.Fatal(err)
		}
		agree(t, &d, b)
		// One byte more, less or other must not be read as something else.
		i := rapid.IntRange(0, len(b)-1).Draw(rt, "at")
		c := rapid.SampledFrom([]byte(`"\,:[]{}0-9aZ é`)).Draw(rt, "byte")
		for _, text := range []string{
			string(b[:i]) + string(c) + string(b[i:]), string(b[:i]) + string(b[i+1:]), string(b[:i]) + string(c) + string(b[i+1:]),
		} {
			agree(t, &d, []byte(text))
		}
	})
}

// An entry of a Merlon that knew one kind of administrator is an operator's, and
// an operator's is one to that Merlon.
func TestAdminIsTheRoleOperator(t *testing.T) {
	e := valid()
	e.Role.Name = role.Operator
	b, err := Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), `"admin":true`) || strings.Contains(string(b), "role") {
		t.Errorf("Encode = %s; want admin and no role", b)
	}
	if got, err := Decode(b); err != nil || got.Role != e.Role {
		t.Errorf("Decode(%s) = %+v, %v", b, got, err)
	}
	for _, bad := range []string{
		`"admin":true,"role":"viewer"`, `"role":"root"`, `"role":"registrar"`, `"role":"registrar","role_prefix":"/a/"`,
		`"role":"viewer","role_prefix":"/a"`, `"role_prefix":"/a"`, `"admin":true,"role_prefix":"/a"`,
	} {
		text := strings.Replace(string(b), `"admin":true`, bad, 1)
		if got, err := Decode([]byte(text)); err == nil {
			t.Errorf("Decode(%s) = %+v; want an error", text, got)
		}
	}
}

func TestOrdinaryEntriesAreReadTheShortWay(t *testing.T) {
	for name, change := range map[string]func(*Entry){
		"plain":       func(*Entry) {},
		"TTLs":        func(e *Entry) { e.X509SVIDTTL, e.JWTSVIDTTL = time.Hour, time.Minute },
		"names":       func(e *Entry) { e.DNSNames, e.CommonName = []string{"a.test", "b.test"}, "a" },
		"admin, hint": func(e *Entry) { e.Role.Name, e.Hint = role.Operator, "for the shop's owner" },
		"own key":     func(e *Entry) { e.KeyDelivery, e.Hint = ByWorkload, "h" },
		"viewer":      func(e *Entry) { e.Role.Name = role.Viewer },
		"registrar":   func(e *Entry) { e.Role = role.Role{Name: role.Registrar, Prefix: "/ns/shop"} },
		"times":       func(e *Entry) { e.CreatedAt, e.ExpiresAt = now, now.Add(time.Hour) },
		"selectors": func(e *Entry) {
			e.Selectors = append(e.Selectors, Selector{"unix", "path:/usr/bin/web"}, Selector{"unix", "gid:7"})
		},
	} {
		e := valid()
		e.ID = strings.Repeat("0123456789abcdef", 2)
		change(e)
		b, err := Encode(e)
		if err != nil {
			t.Fatal(err)
		}
		if !agree(t, new(Decoder), b) {
			t.Errorf("%s: %s was not read the short way", name, b)
		}
	}
}

func TestDecoderKeepsParentsOnce(t *testing.T) {
	var d Decoder
	for i := range maxParents + 10 {
		e := valid()
		e.ParentID = spiffeid.RequireFromPath(td, fmt.Sprintf("/agent/n%d", i))
		b, err := Encode(e)
		if err != nil {
			t.Fatal(err)
		}
		got, err := d.Decode(b)
		if err != nil || got.ParentID != e.ParentID {
			t.Fatalf("Decode = %+v, %v; want the parent %s", got, err, e.ParentID)
		}
	}
	if len(d.parents) > maxParents {
		t.Errorf("it remembers %d parents; at most %d", len(d.parents), maxParents)
	}
}

func BenchmarkDecode(b *testing.B) {
	e := valid()
	e.ID, e.CreatedAt = NewID(), now
	e.Selectors = []Selector{{"unix", "uid:1000"}, {"unix", "path:/usr/bin/web"}}
	value, err := Encode(e)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("short", func(b *testing.B) {
		var d Decoder
		b.ReportAllocs()
		for b.Loop() {
			if d.cut(value) == nil {
				b.Fatal("went the long way")
			}
		}
	})
	b.Run("json", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := decodeJSON(value); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func FuzzBothWaysOfDecodingAgree(f *testing.F) {
	b, _ := Encode(valid())
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) { agree(t, new(Decoder), b) })
}
