// What a credential is worth while a call goes on.

package api

import (
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
)

// A long poll outlives what let it in.
func TestFaultComesWithTime(t *testing.T) {
	s, agent := newService(t)
	live, gone := Anonymous(), Anonymous()
	live.Expiry, gone.Expiry = time.Now().Add(time.Hour), time.Now()
	stranger := peerOf(t, "spiffe://shop.test/agent/gone", agent.Handle, agent.Revision)
	for name, test := range map[string]struct {
		c    *Caller
		want bool
	}{
		"nobody":                   {Anonymous(), false},
		"a token":                  {live, false},
		"a token that ended":       {gone, true},
		"an agent":                 {s.PeerCaller(peerOf(t, agent.ID.String(), agent.Handle, agent.Revision)), false},
		"an agent that is no more": {&Caller{Peer: stranger}, true},
	} {
		if fault := s.FaultSince(test.c); (fault != "") != test.want {
			t.Errorf("%s: fault %q; want one = %t", name, fault, test.want)
		}
	}
}

func TestBearerIsOneTokenOrNone(t *testing.T) {
	for name, test := range map[string]struct {
		values []string
		token  string
		shown  bool
	}{
		"none":       {nil, "", false},
		"one":        {[]string{"Bearer a.b.c"}, "a.b.c", true},
		"lower case": {[]string{"bearer a.b.c"}, "a.b.c", true},
		"two":        {[]string{"Bearer a.b.c", "Bearer d.e.f"}, "", true},
		"basic":      {[]string{"Basic YTpi"}, "", true},
		"no token":   {[]string{"Bearer "}, "", true},
		"scheme":     {[]string{"Bearer"}, "", true},
		"empty":      {[]string{""}, "", true},
	} {
		token, shown := bearer(metadata.MD{authorization: test.values})
		if token != test.token || shown != test.shown {
			t.Errorf("%s: %q, %t; want %q, %t", name, token, shown, test.token, test.shown)
		}
	}
}
