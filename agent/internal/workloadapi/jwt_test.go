// JWT-SVIDs that were asked for and do not hold any more when they come.

package workloadapi

import (
	"context"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// signing is a CA that does something while it signs.
type signing struct {
	cache.Authority
	root *forge.Authority
	do   func()
}

func (s *signing) SignJWT(_ context.Context, items []*capb.SignJWTItem) ([]*capb.SignJWTResult, error) {
	s.do()
	serial, err := svid.NewSerial(7, 1)
	if err != nil {
		return nil, err
	}
	var results []*capb.SignJWTResult
	for _, item := range items {
		results = append(results, &capb.SignJWTResult{Token: s.root.JWT(s.root.Header(nil), s.root.Claims("", forge.Fields{
			"sub": "spiffe://example.test/web", "aud": item.GetAudience(), "jti": serial.String(),
		}))})
	}
	return results, nil
}

// An entry that goes while the CA signs takes the answer with it.
func TestJWTSVIDOfAnEntryThatWentMeanwhileIsNotGiven(t *testing.T) {
	ca := &signing{root: forge.New(t, td.Name()), do: func() {}}
	c, socket := serveBy(t, ca, time.Minute)
	jwks, err := ca.root.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	apply := func(m *capb.SyncResponse) {
		m.Synced = true
		if err := c.Apply(t.Context(), m); err != nil {
			t.Error(err)
		}
	}
	entry := func(id string) *capb.Entry {
		return &capb.Entry{
			EntryId: id, SpiffeId: "spiffe://example.test/web", Revision: 1,
			Selectors: []*capb.Selector{{Type: "unix", Value: "path:" + program(t)}},
		}
	}
	apply(&capb.SyncResponse{
		Revision: 1, Entries: []*capb.Entry{entry("e1")},
		TrustBundle: &capb.TrustBundle{TrustDomain: td.Name(), Sequence: 1, Jwks: jwks},
	})
	cc, err := grpc.NewClient(socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), endpoint.Header, "true"), 30*time.Second)
	defer cancel()
	fetch := func(audience string) error {
		_, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{audience}})
		return err
	}
	if err := fetch("a"); err != nil {
		t.Fatal(err)
	}
	ca.do = func() {
		apply(&capb.SyncResponse{Revision: 2, RemovedEntryIds: []string{"e1"}, Entries: []*capb.Entry{entry("e2")}})
	}
	if err := fetch("b"); status.Code(err) != codes.Unavailable {
		t.Errorf("FetchJWTSVID() = %v where its entry went meanwhile; want Unavailable", err)
	}
}
