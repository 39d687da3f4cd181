// Bytes from outside: the agent's messages and the address of its socket.

package sdk

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/protobuf/proto"

	"merlon.dev/agent/agentpb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// Whatever the agent sends, an identity comes out only if the strict verifier
// takes it.
func FuzzX509SVIDMessage(f *testing.F) {
	authority := forge.New(f, "sdktest.test")
	leaf := authority.Leaf("/web")
	chain, key, err := leaf.X509SVID().MarshalRaw()
	if err != nil {
		f.Fatal(err)
	}
	root := authority.Root().Bundle().X509Authorities()[0].Raw
	f.Add("spiffe://sdktest.test/web", chain, key, root, "spiffe://foreign.test", root)
	f.Add("spiffe://sdktest.test/web", chain, key, root, "spiffe://sdktest.test", []byte{})
	f.Add("spiffe://sdktest.test/web", chain[:len(chain)-1], key, root, "", []byte{0x30})
	f.Add("", []byte{}, []byte{}, []byte{}, "", []byte{})
	f.Fuzz(func(t *testing.T, id string, chain, key, bundle []byte, federated string, foreign []byte) {
		now := time.Now()
		next, err := parseSVIDs(&workload.X509SVIDResponse{
			Svids:            []*workload.X509SVID{{SpiffeId: id, X509Svid: chain, X509SvidKey: key, Bundle: bundle}},
			FederatedBundles: map[string][]byte{federated: foreign},
		}, now)
		if err != nil || next.svid == nil {
			return
		}
		if next.svid.ID.String() != id {
			t.Errorf("the identity is %s and the message says %q", next.svid.ID, id)
		}
		peer, err := svid.VerifyChain(next.svid.Certificates, next.bundles, now)
		if err != nil || !next.trusts(peer) {
			t.Errorf("an identity that others would refuse: %v", err)
		}
	})
}

// We accept no address that go-spiffe refuses, and only absolute paths.
func FuzzSocketPath(f *testing.F) {
	for _, seed := range []string{"unix:///run/api.sock", "unix:/run/api.sock", "unix:api.sock", "unix://run/api.sock", "unix:///a?b", "unix:///a#", "tcp://127.0.0.1:1", "unix:///%00", "UNIX:///a", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, address string) {
		path, err := socketPath(address)
		if err != nil {
			return
		}
		if err := workloadapi.ValidateAddress(address); err != nil {
			t.Errorf("socketPath(%q) = %q; go-spiffe refuses it: %v", address, path, err)
		}
		if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
			t.Errorf("socketPath(%q) = %q", address, path)
		}
	})
}

// Whatever an agent sends of revocations, only those that are understood are known
// afterwards, and none that was known is forgotten by what is not understood.
func FuzzWatchResponse(f *testing.F) {
	for _, m := range []*agentpb.WatchResponse{
		{}, {Reset_: true}, {Revocations: []*agentpb.Revocation{{Subject: &agentpb.Revocation_SpiffeId{SpiffeId: "spiffe://td/a"}, BeforeRevision: 3}, {Subject: &agentpb.Revocation_Serial{Serial: "0a"}}, {}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m agentpb.WatchResponse
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		id := bare()
		id.revocations.Store(svid.NewRevocations([]svid.Revocation{{SPIFFEID: "spiffe://sdktest.test/gone", ExpiresAt: time.Now().Add(time.Hour)}}))
		id.revoke(t.Context(), &m)
		known := id.revocations.Load()
		if known.Len() > 1+len(m.GetRevocations()) {
			t.Fatalf("%v: %d records are known", &m, known.Len())
		}
		if !m.GetReset_() && known.Len() == 0 {
			t.Fatalf("%v: what was known is forgotten", &m)
		}
	})
}
