// Requests that the standard refuses, and limits.

package agent_test

import (
	"context"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/fakeca"
)

func TestRequestsThatCannotBeAnswered(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	cc, ctx := conn(t, n.socket)
	client := workload.NewSpiffeWorkloadAPIClient(cc)
	tests := map[string]struct {
		req  *workload.JWTSVIDRequest
		want codes.Code
	}{
		"no audience":       {&workload.JWTSVIDRequest{}, codes.InvalidArgument},
		"empty audience":    {&workload.JWTSVIDRequest{Audience: []string{"a", ""}}, codes.InvalidArgument},
		"too many":          {&workload.JWTSVIDRequest{Audience: make([]string, 17)}, codes.InvalidArgument},
		"too long":          {&workload.JWTSVIDRequest{Audience: []string{strings.Repeat("a", 2049)}}, codes.InvalidArgument},
		"no SPIFFE ID":      {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "web"}, codes.InvalidArgument},
		"another's":         {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://" + td + "/other"}, codes.PermissionDenied},
		"the own, by name":  {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://" + td + "/web"}, codes.OK},
		"all that are ours": {&workload.JWTSVIDRequest{Audience: []string{"a"}}, codes.OK},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if m, err := client.FetchJWTSVID(ctx, tt.req); status.Code(err) != tt.want || err == nil && len(m.Svids) != 1 {
				t.Errorf("FetchJWTSVID() = %v, %v; want %v", m, err, tt.want)
			}
		})
	}
	for _, req := range []*workload.ValidateJWTSVIDRequest{{Svid: "x"}, {Audience: "x"}, {Audience: "x", Svid: "x.y.z"}} {
		if _, err := client.ValidateJWTSVID(ctx, req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("ValidateJWTSVID(%v) = %v; want InvalidArgument", req, err)
		}
	}
	wit, err := client.FetchWITSVID(ctx, &workload.WITSVIDRequest{})
	if err == nil {
		_, err = wit.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("FetchWITSVID() = %v; want Unimplemented", err)
	}
}

func TestHintsAreUnique(t *testing.T) {
	ca := fakeca.New(t, td)
	for _, id := range []string{"e1", "e2"} {
		e := ca.Entry(id, "/"+id, uidSelector)
		e.Hint = "internal"
		ca.PutEntry(e)
	}
	n := start(t, newConfig(t, ca))
	stream := n.x509Stream(t)
	m, err := stream.Recv()
	for err == nil && len(m.Svids) < 2 { // one was issued before the other
		m, err = stream.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	if m.Svids[0].SpiffeId != "spiffe://"+td+"/e1" || m.Svids[0].Hint != "internal" || m.Svids[1].Hint != "" {
		t.Errorf("%s with hint %q, then %q; want /e1 with the hint, alone", m.Svids[0].SpiffeId, m.Svids[0].Hint, m.Svids[1].Hint)
	}
}

func TestOneUserCannotOpenStreamsWithoutEnd(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	client := func() (workload.SpiffeWorkloadAPIClient, context.Context) {
		cc, ctx := conn(t, n.socket)
		return workload.NewSpiffeWorkloadAPIClient(cc), ctx
	}
	var refused error
	for range 11 { // connections, because one holds at most 1000 streams
		c, ctx := client()
		for range 100 {
			s, err := c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			if err != nil && refused == nil { // later ones may be refused for their rate
				refused = err
			}
		}
	}
	wantError(t, refused, codes.ResourceExhausted, "TOO_MANY_STREAMS")
}
