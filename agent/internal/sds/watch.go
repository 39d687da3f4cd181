// What one stream asked for and what it was told: when there is something to
// say, in both dialects of xDS, state of the world and delta.

package sds

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"merlon.dev/agent/internal/cache"
)

// secretType is the only type of resource here.
const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// Bounds of what one stream may make the agent remember.
const (
	maxNames      = 1024
	maxNamesBytes = 64 << 10
	maxWordsBytes = 1 << 10
)

// optOut is the key in the metadata of a node with which an Envoy asks for
// plain roots, without the SPIFFE validator.
const optOut = "disable_spiffe_cert_validation"

// watch is one stream's. It is for one goroutine.
type watch struct {
	names map[string]bool   // asked for
	every bool              // asked for is what holdings.every lists too
	told  map[string]string // name → version, empty for one that stands for nothing
	plain bool
	envoy string // what it calls itself, for the log

	begun   bool     // the first request was taken
	answers uint64   // the nonce of the last one
	last    []string // the names in it
}

func newWatch() *watch { return &watch{names: map[string]bool{}, told: map[string]string{}} }

// stateOfTheWorld takes a request that names everything asked for. refusal is
// what the caller has against the last answer, empty for nothing.
func (w *watch) stateOfTheWorld(req *discoveryv3.DiscoveryRequest) (refusal string, err error) {
	first, err := w.begin(req.GetTypeUrl(), req.GetNode())
	if err != nil {
		return "", err
	}
	nonce, names := req.GetResponseNonce(), req.GetResourceNames()
	switch {
	case nonce == "" || w.answers == 0:
		clear(w.told) // asked anew, so answered anew
	case nonce != w.nonce():
		return "", nil // of an answer that another one has replaced since
	default:
		refusal = words(req.GetErrorDetail())
	}
	if first {
		w.every = len(names) == 0
	} else if len(names) > 0 {
		w.every = false
	}
	clear(w.names)
	w.subscribe(names)
	maps.DeleteFunc(w.told, func(name string, _ string) bool { return !w.every && !w.names[name] })
	return refusal, w.check()
}

// delta takes a request that names what is asked for beside, and not any more.
func (w *watch) delta(req *discoveryv3.DeltaDiscoveryRequest) (refusal string, err error) {
	first, err := w.begin(req.GetTypeUrl(), req.GetNode())
	if err != nil {
		return "", err
	}
	if w.answers > 0 && req.GetResponseNonce() == w.nonce() {
		refusal = words(req.GetErrorDetail())
	}
	w.subscribe(req.GetResourceNamesSubscribe())
	for _, name := range req.GetResourceNamesSubscribe() {
		delete(w.told, name) // asked anew, so answered anew
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		delete(w.names, name)
		delete(w.told, name)
		if name == nameEvery {
			w.every = false
		}
	}
	if first {
		w.every = w.every || len(req.GetResourceNamesSubscribe()) == 0
		for name, version := range req.GetInitialResourceVersions() { // kept from another stream
			if version != "" && (w.every || w.names[name]) {
				w.told[name] = version
			}
		}
	}
	return refusal, w.check()
}

// begin takes what both dialects have in common.
func (w *watch) begin(typeURL string, node *corev3.Node) (first bool, err error) {
	if typeURL != "" && typeURL != secretType {
		return false, status.Errorf(codes.InvalidArgument, "type_url: only %s is served here", secretType)
	}
	if first = !w.begun; first {
		w.begun = true
		w.plain = optedOut(node.GetMetadata().GetFields()[optOut])
		w.envoy = shorten(node.GetId())
	}
	return first, nil
}

func optedOut(v *structpb.Value) bool {
	return v.GetBoolValue() || strings.EqualFold(v.GetStringValue(), "true")
}

func (w *watch) subscribe(names []string) {
	for _, name := range names {
		if name == nameEvery {
			w.every = true
			continue
		}
		w.names[name] = true
	}
}

// check bounds what the stream costs.
func (w *watch) check() error {
	size := 0
	for _, kept := range []int{len(w.names), len(w.told)} {
		if kept > maxNames {
			return status.Errorf(codes.InvalidArgument, "resource names: %d asked for on one stream, at most %d are allowed", kept, maxNames)
		}
	}
	for name := range w.names {
		size += len(name)
	}
	for name, version := range w.told {
		size += len(name) + len(version)
	}
	if size > maxNamesBytes {
		return status.Errorf(codes.InvalidArgument, "resource names: %d bytes on one stream, at most %d are allowed", size, maxNamesBytes)
	}
	return nil
}

// certificates are those of the caller's entries whose X509-SVIDs are asked for.
// No others are made.
func (w *watch) certificates(all []*cache.Entry) (wanted []*cache.Entry) {
	for i, e := range all {
		if w.every || w.names[e.SPIFFEID.String()] || i == 0 && w.names[nameDefault] {
			wanted = append(wanted, e)
		}
	}
	return wanted
}

// answer is what there is to say.
type answer struct {
	present []resource // of what was asked for
	changed []resource // of those, what was not told yet
	gone    []string   // stands for nothing, which was not told yet
	unsure  bool       // for some name nothing can be said yet
}

func (a answer) news() bool { return len(a.changed)+len(a.gone) > 0 }

// trust is the sequence number of the own trust bundle in it; 0 for none.
func (a answer) trust() uint64 {
	for _, r := range a.present {
		if r.own != 0 {
			return r.own
		}
	}
	return 0
}

// compare finds what to say of h. Of a name about which h is unsure it says
// nothing: Envoy keeps what it has.
func (w *watch) compare(h holdings) (a answer) {
	for _, name := range w.wanted(h) {
		r, standing := h.look(name)
		said, told := w.told[name]
		switch {
		case standing == unsure:
			a.unsure = true
		case standing == absent && (!told || said != ""):
			a.gone = append(a.gone, name)
		case standing == present:
			a.present = append(a.present, r)
			if !told || said != r.version() {
				a.changed = append(a.changed, r)
			}
		}
	}
	return a
}

// wanted are the names that a look is due for, sorted.
func (w *watch) wanted(h holdings) []string {
	names := slices.Collect(maps.Keys(w.names))
	if w.every {
		names = append(names, h.every()...)
		names = slices.AppendSeq(names, maps.Keys(w.told)) // they may be gone
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// tell remembers that a is being said, and returns its nonce.
func (w *watch) tell(a answer) string {
	w.answers++
	w.last = nil
	for _, r := range a.changed {
		w.told[r.name] = r.version()
		w.last = append(w.last, r.name)
	}
	for _, name := range a.gone {
		if w.told[name] = ""; !w.names[name] {
			delete(w.told, name) // nobody asked for it by name
		}
		w.last = append(w.last, name)
	}
	return w.nonce()
}

func (w *watch) nonce() string { return strconv.FormatUint(w.answers, 10) }

// words are those of a refusal.
func words(s *statuspb.Status) string {
	if s == nil {
		return ""
	}
	if s.GetMessage() == "" {
		return codes.Code(s.GetCode()).String()
	}
	return shorten(s.GetMessage())
}

func shorten(text string) string {
	if len(text) > maxWordsBytes {
		return strings.ToValidUTF8(text[:maxWordsBytes], "") + "…"
	}
	return text
}
