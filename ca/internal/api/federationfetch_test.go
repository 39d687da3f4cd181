// Polling: one record that nobody can read stops nothing.

package api

import (
	"context"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/store"
)

func TestUnreadableSourceStopsNothing(t *testing.T) {
	s, _ := newService(t)
	ctx := context.WithValue(t.Context(), callerKey{}, &Caller{Name: "test"})
	asked := 0
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked++
		fmt.Fprint(w, `{"keys":[],"spiffe_sequence":1}`)
	}))
	defer srv.Close()
	good := federation.Source{
		TrustDomain: spiffeid.RequireTrustDomainFromString("good.test"), URL: srv.URL, Profile: federation.Web, SetAt: time.Now(),
		Authorities: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})),
	}
	put, err := good.Put()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.opts.Store.Txn(ctx, nil, []store.Op{store.Put(federation.SourcePrefix+"aaa.test", []byte(`{"v":2}`)), put}, nil); err != nil {
		t.Fatal(err)
	}
	due := make(polling)
	if err := s.pollDue(ctx, due, time.Now()); err == nil || !strings.Contains(err.Error(), "aaa.test") || asked != 1 {
		t.Errorf("%v, and the other was asked %d times; want an error that names the record, and once", err, asked)
	}
	// Without a hint it is due in 5 minutes, give or take a tenth (B10), and not before.
	now := time.Now()
	if in := due[good.TrustDomain].at.Sub(now); in < 4*time.Minute || in > 6*time.Minute {
		t.Errorf("due in %v", in)
	}
	if _ = s.pollDue(ctx, due, now.Add(time.Minute)); asked != 1 {
		t.Errorf("asked %d times within a minute (F-3)", asked)
	}
	list, err := s.ListFederatedBundles(ctx, &capb.ListFederatedBundlesRequest{})
	if err != nil || len(list.GetFederatedBundles()) != 2 || !strings.Contains(list.GetFederatedBundles()[0].GetSource().GetFailure(), "cannot be read") {
		t.Errorf("%v, %v; want the unreadable one, with why", list, err)
	}
	if _, err := s.RemoveFederatedBundle(ctx, &capb.RemoveFederatedBundleRequest{TrustDomain: "aaa.test"}); err != nil {
		t.Errorf("remove what cannot be read: %v", err)
	}
	if err := s.pollDue(ctx, due, now); err != nil {
		t.Errorf("after it was removed: %v", err)
	}
}
