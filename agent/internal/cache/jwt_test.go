// JWT-SVIDs: used again, admitted, forgotten.

package cache

import (
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

func TestJWTSVIDsAreUsedAgainForHalfTheirLife(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		entries, _ := f.Entitled(proves("unix:uid:1"))
		get := func(audience ...string) string {
			t.Helper()
			token, err := f.JWTSVID(t.Context(), entries[0], audience, freely)
			if err != nil {
				t.Fatal(err)
			}
			return token
		}
		first := get("x", "y")
		if get("y", "x") != first || f.ca.jwts != 1 {
			t.Error("not used again for the same audience")
		}
		if get("x") == first {
			t.Error("used for another audience")
		}
		time.Sleep(3 * time.Minute)
		second := get("x", "y")
		if second == first {
			t.Error("used beyond half of its life")
		}
		f.ca.set(func(s *signer) { s.err = status.Error(codes.Unavailable, "away") })
		time.Sleep(4 * time.Minute)
		if get("x", "y") != second {
			t.Error("not used until its end while the CA is away")
		}
		time.Sleep(time.Minute)
		if token, err := f.JWTSVID(t.Context(), entries[0], []string{"x", "y"}, freely); status.Code(err) != codes.Unavailable {
			t.Errorf("JWTSVID() = %q, %v after its end; want Unavailable", token, err)
		}
	})
}

// freely admits every request for a JWT-SVID.
func freely() error { return nil }

// Whoever has had his share of requests to the CA gets what is held, for as long
// as it is valid, and else is told.
func TestJWTSVIDsThatAreHeldNeedNoAdmission(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		entries, _ := f.Entitled(proves("unix:uid:1"))
		tooMany := errors.New("too many")
		never := func() error { return tooMany }
		if token, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, never); !errors.Is(err, tooMany) {
			t.Errorf("JWTSVID() = %q, %v; want the refusal", token, err)
		}
		first, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, freely)
		if err != nil {
			t.Fatal(err)
		}
		for _, age := range []time.Duration{0, 4 * time.Minute} { // at 4 min it would be renewed
			time.Sleep(age)
			if token, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, never); err != nil || token != first {
				t.Errorf("JWTSVID() = %q, %v; want the one that is held", token, err)
			}
		}
		time.Sleep(2 * time.Minute)
		if token, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, never); !errors.Is(err, tooMany) {
			t.Errorf("JWTSVID() = %q, %v after its end; want the refusal", token, err)
		}
	})
}

func TestJWTSVIDsThatAreNotWhatWasAskedAreRefused(t *testing.T) {
	for name, claims := range map[string]forge.Fields{
		"another SPIFFE ID":    {"sub": "spiffe://" + td + "/other"},
		"another trust domain": {"sub": "spiffe://other.test/a"},
		"another audience":     {"aud": []string{"y"}},
		"one audience more":    {"aud": []string{"x", "y"}},
		"expired":              {"exp": 1},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(t *testing.T, f *fixture) {
				f.sync(newEntry("e1", "/a", "unix:uid:1"))
				f.ca.set(func(s *signer) { s.claims = claims })
				e, _ := f.Entitled(proves("unix:uid:1"))
				if token, err := f.JWTSVID(t.Context(), e[0], []string{"x"}, freely); err == nil {
					t.Errorf("JWTSVID() = %q; want none", token)
				}
			})
		})
	}
}

func TestRevokedJWTSVIDIsForgotten(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		entries, _ := f.Entitled(proves("unix:uid:1"))
		first, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, freely)
		if err != nil {
			t.Fatal(err)
		}
		f.ca.set(func(c *signer) { c.revision = 100 })
		f.apply(&capb.SyncResponse{Revocations: []*capb.Revocation{{
			Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/a"}, BeforeRevision: 100,
		}}})
		if second, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, freely); err != nil || second == first {
			t.Errorf("JWTSVID() = the revoked one, %v; want a fresh one", err)
		}
	})
}
