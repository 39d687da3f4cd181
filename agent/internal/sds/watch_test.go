// Laws of one stream: what a client that believes every answer knows is what
// there is, it is told nothing twice, and foreign requests cost little.

package sds

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/sdk/svid"
)

var td = spiffeid.RequireTrustDomainFromString("example.test")

// world draws what a caller may have: some of three SPIFFE IDs, each with an
// X509-SVID or still without.
func world(t *rapid.T) holdings {
	h := holdings{td: td, plain: rapid.Bool().Draw(t, "plain")}
	h.view.Current = rapid.Bool().Draw(t, "current")
	if sequence := rapid.IntRange(0, 3).Draw(t, "trust"); sequence > 0 {
		h.view.Trust = &cache.Trust{Sequence: uint64(sequence)}
	}
	for _, path := range []string{"/a", "/b", "/c"} {
		serial := rapid.IntRange(-1, 3).Draw(t, path)
		if serial < 0 {
			continue // no entry
		}
		e := &cache.Entry{ID: path, SPIFFEID: spiffeid.RequireFromPath(td, path)}
		h.view.Entries = append(h.view.Entries, e)
		if serial > 0 {
			h.view.SVIDs = append(h.view.SVIDs, &cache.SVID{Entry: e, Peer: &svid.Peer{ID: e.SPIFFEID, SerialHex: fmt.Sprint(serial)}})
		}
	}
	return h
}

var someNames = rapid.SliceOfNDistinct(rapid.SampledFrom([]string{
	"default", "ROOTCA", "ALL", "*", "spiffe://example.test", "spiffe://example.test/a", "spiffe://example.test/b",
	"spiffe://example.test/z", "spiffe://stranger.test", "spiffe://stranger.test/a", "nonsense", "",
}), 0, 5, rapid.ID[string])

// client believes what it is told: name → version.
type client struct {
	w     *watch
	knows map[string]string
}

// settle lets the server say what there is to say of h, and checks both laws.
func (c *client) settle(t *rapid.T, h holdings) {
	a := c.w.compare(h)
	if a.news() {
		before := c.w.nonce()
		if nonce := c.w.tell(a); nonce == before {
			t.Fatalf("nonce %s twice", nonce)
		}
		for _, r := range a.changed {
			if c.knows[r.name] == r.version() {
				t.Fatalf("%s is told twice", r.name)
			}
			c.knows[r.name] = r.version()
		}
		for _, name := range a.gone {
			delete(c.knows, name)
		}
	}
	if again := c.w.compare(h); again.news() {
		t.Fatalf("there is news after all was told: %+v", again)
	}
	for _, name := range c.w.wanted(h) {
		r, standing := h.look(name)
		switch known, ok := c.knows[name]; {
		case standing == present && known != r.version():
			t.Fatalf("%s is known as %q; want %s", name, known, r.version())
		case standing == absent && ok:
			t.Fatalf("%s is known as %s; want it to be gone", name, known)
		}
	}
}

func TestDeltaTellsWhatThereIs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &client{w: newWatch(), knows: map[string]string{}}
		h := world(t)
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "request") {
				req := &discoveryv3.DeltaDiscoveryRequest{
					ResourceNamesSubscribe: someNames.Draw(t, "subscribe"), ResourceNamesUnsubscribe: someNames.Draw(t, "unsubscribe"),
				}
				if _, err := c.w.delta(req); err != nil {
					t.Fatal(err)
				}
				for _, name := range slices.Concat(req.ResourceNamesSubscribe, req.ResourceNamesUnsubscribe) {
					delete(c.knows, name) // asked anew, or forgotten
				}
			} else {
				h = world(t)
			}
			c.settle(t, h)
		}
	})
}

func TestStateOfTheWorldTellsWhatThereIs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &client{w: newWatch(), knows: map[string]string{}}
		h := world(t)
		names := someNames.Draw(t, "names")
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			switch rapid.IntRange(0, 2).Draw(t, "step") {
			case 0: // a change of names
				names = someNames.Draw(t, "names")
				fallthrough
			case 1: // an acknowledgement, or a refusal
				req := &discoveryv3.DiscoveryRequest{ResourceNames: names, ResponseNonce: c.w.nonce()}
				if rapid.Bool().Draw(t, "refused") {
					req.ErrorDetail = &statuspb.Status{Code: 3, Message: "no"}
				}
				if _, err := c.w.stateOfTheWorld(req); err != nil {
					t.Fatal(err)
				}
				maps.DeleteFunc(c.knows, func(name string, _ string) bool { return !c.w.every && !c.w.names[name] })
			default:
				h = world(t)
			}
			c.settle(t, h)
		}
	})
}

// A stream hears nothing about what it was not asked.
func TestStaleAnswersChangeNothing(t *testing.T) {
	w := newWatch()
	request := func(nonce string, problem string, names ...string) string {
		t.Helper()
		req := &discoveryv3.DiscoveryRequest{ResourceNames: names, ResponseNonce: nonce}
		if problem != "" {
			req.ErrorDetail = &statuspb.Status{Message: problem}
		}
		refusal, err := w.stateOfTheWorld(req)
		if err != nil {
			t.Fatal(err)
		}
		return refusal
	}
	h := holdings{td: td}
	h.view.Current = true
	request("", "", "a")
	first := w.tell(w.compare(h))
	request(first, "", "a", "b")
	second := w.tell(w.compare(h))
	if refusal := request(first, "late", "c"); refusal != "" || w.names["c"] || !w.names["b"] {
		t.Errorf("of an earlier answer: refusal %q, names %v; want it to be passed over", refusal, w.names)
	}
	if refusal := request(second, "now", "a", "b"); refusal != "now" {
		t.Errorf("of the last answer: refusal %q; want now", refusal)
	}
	if a := w.compare(h); a.news() {
		t.Errorf("after a refusal: %+v; want nothing until something changes", a)
	}
	// Without a nonce it is a new question.
	request("", "", "a")
	if a := w.compare(h); !slices.Equal(a.gone, []string{"a"}) {
		t.Errorf("asked anew: %+v; want a to be answered", a)
	}
}

func TestDeltaRefusalIsOfTheLastAnswer(t *testing.T) {
	w := newWatch()
	request := func(nonce string) string {
		t.Helper()
		refusal, err := w.delta(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: nonce, ErrorDetail: &statuspb.Status{Message: "no"}})
		if err != nil {
			t.Fatal(err)
		}
		return refusal
	}
	if refusal := request("0"); refusal != "" {
		t.Errorf("before the first answer: refusal %q", refusal)
	}
	first := w.tell(answer{})
	second := w.tell(answer{})
	for nonce, want := range map[string]string{"": "", first: "", second: "no"} {
		if refusal := request(nonce); refusal != want {
			t.Errorf("with nonce %q: refusal %q; want %q", nonce, refusal, want)
		}
	}
}

// FuzzRequests: any bytes that are a request cost no more than the bounds, and
// never lead to a secret that is not the caller's.
func FuzzRequests(f *testing.F) {
	for _, names := range [][]string{nil, {"default"}, {"*", "ROOTCA"}, {"spiffe://example.test/a", "spiffe://example.test/a", "\x00"}} {
		state, err := proto.Marshal(&discoveryv3.DiscoveryRequest{ResourceNames: names, TypeUrl: secretType, ResponseNonce: "1"})
		if err != nil {
			f.Fatal(err)
		}
		delta, err := proto.Marshal(&discoveryv3.DeltaDiscoveryRequest{
			ResourceNamesSubscribe: names, ResourceNamesUnsubscribe: []string{"ROOTCA"},
			InitialResourceVersions: map[string]string{"default": "1", "spiffe://example.test/b": "2"},
		})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(state, delta)
	}
	entry := &cache.Entry{ID: "a", SPIFFEID: spiffeid.RequireFromString("spiffe://example.test/a")}
	h := holdings{td: td}
	h.view = cache.View{
		Current: true, Entries: []*cache.Entry{entry}, Trust: &cache.Trust{Sequence: 1},
		SVIDs: []*cache.SVID{{Entry: entry, Peer: &svid.Peer{ID: entry.SPIFFEID, SerialHex: "1"}}},
	}
	f.Fuzz(func(t *testing.T, state, delta []byte) {
		var s discoveryv3.DiscoveryRequest
		var d discoveryv3.DeltaDiscoveryRequest
		if proto.Unmarshal(state, &s) != nil || proto.Unmarshal(delta, &d) != nil {
			t.Skip()
		}
		one, other := newWatch(), newWatch()
		for range 2 {
			_, err1 := one.stateOfTheWorld(&s)
			_, err2 := other.delta(&d)
			for w, err := range map[*watch]error{one: err1, other: err2} {
				if err != nil {
					continue
				}
				a := w.compare(h)
				w.tell(a)
				if len(w.told) > maxNames+4 || len(w.names) > maxNames {
					t.Fatalf("%d names, %d told", len(w.names), len(w.told))
				}
				for _, r := range a.present {
					nobodys := isTrustDomain(r.name) && r.svid == nil && r.version() == "nobody"
					if r.svid != nil && r.svid != h.view.SVIDs[0] || r.svid == nil && r.own != h.view.Trust.Sequence && !nobodys {
						t.Fatalf("%q is %+v", r.name, r)
					}
					if r.svid != nil && r.name != nameDefault && r.name != entry.SPIFFEID.String() {
						t.Fatalf("%q is the X509-SVID of %s", r.name, entry.SPIFFEID)
					}
				}
			}
		}
	})
}
