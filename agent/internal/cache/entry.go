// Registration entries as the agent holds them, and which of them a set of
// proved selectors satisfies.

package cache

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"merlon.dev/agent/internal/workload"
	"merlon.dev/ca/capb"
)

// Entry is one registration entry of this node. It is immutable.
type Entry struct {
	ID       string
	SPIFFEID spiffeid.ID
	// Selectors are "type:value", sorted, each once. A workload must prove all
	// of them. None at all matches nothing.
	Selectors []string
	Hint      string
	Revision  uint64
	CreatedAt time.Time
	// ExpiresAt is zero for an entry that does not expire.
	ExpiresAt time.Time
	// AgentKey: the agent may make the key of its X509-SVIDs and hand it over.
	// OwnKey: the workload may make it. One of them, or both.
	AgentKey, OwnKey bool
	// FederatesWith names the other trust domains that the workload may know.
	FederatesWith []string

	// certificate sums up what else goes into an X509-SVID: when it changes,
	// the SVID has to be made anew.
	certificate string
	// wire is the entry as the CA sent it, for the disk.
	wire []byte
}

// maxHintBytes is the Workload API's bound on a hint (§5.2.1).
const maxHintBytes = 1024

// parseEntry checks an entry that the CA pushed, so that a mistake there
// cannot give an identity away here.
func parseEntry(pb *capb.Entry, td spiffeid.TrustDomain) (*Entry, error) {
	if pb.GetEntryId() == "" {
		return nil, errors.New("no entry_id")
	}
	id, err := spiffeid.FromString(pb.GetSpiffeId())
	if err != nil {
		return nil, fmt.Errorf("spiffe_id: %w", err)
	}
	if !id.MemberOf(td) || id.Path() == "" {
		return nil, fmt.Errorf("spiffe_id %s: not a workload of trust domain %s", id, td.Name())
	}
	e := &Entry{
		ID:       pb.GetEntryId(),
		SPIFFEID: id,
		Hint:     pb.GetHint(),
		Revision: pb.GetRevision(), FederatesWith: pb.GetFederatesWith(),
		certificate: fmt.Sprintf("%d %q %q", pb.GetX509SvidTtlSeconds(), pb.GetDnsNames(),
			pb.GetCommonName()),
	}
	switch pb.GetKeyDelivery() {
	case capb.KeyDelivery_KEY_DELIVERY_UNSPECIFIED, capb.KeyDelivery_KEY_DELIVERY_AGENT:
		e.AgentKey = true
	case capb.KeyDelivery_KEY_DELIVERY_WORKLOAD:
		e.OwnKey = true
	case capb.KeyDelivery_KEY_DELIVERY_BOTH:
		e.AgentKey, e.OwnKey = true, true
	default: // of a newer CA: what it forbids is not known
		return nil, fmt.Errorf("key_delivery %s is not known to this agent", pb.GetKeyDelivery())
	}
	if len(e.Hint) > maxHintBytes {
		e.Hint = ""
	}
	for _, s := range pb.GetSelectors() {
		if s.GetType() == "" || s.GetValue() == "" {
			return nil, fmt.Errorf("selector %q: type and value are both needed", s.GetType()+":"+s.GetValue())
		}
		e.Selectors = append(e.Selectors, s.GetType()+":"+s.GetValue())
	}
	slices.Sort(e.Selectors)
	e.Selectors = slices.Compact(e.Selectors)
	if t := pb.GetCreatedAt(); t != nil {
		e.CreatedAt = t.AsTime()
	}
	if t := pb.GetExpiresAt(); t != nil {
		e.ExpiresAt = t.AsTime()
	}
	if e.wire, err = proto.Marshal(pb); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return e, nil
}

// Expired says whether the entry gives no identity any more.
func (e *Entry) Expired(now time.Time) bool { return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt) }

// MatchedBy says whether proved, sorted, holds every selector of the entry.
func (e *Entry) MatchedBy(proved []string) bool {
	return len(e.Selectors) > 0 && len(e.missing(proved)) == 0
}

func (e *Entry) missing(proved []string) (missing []string) {
	for _, s := range e.Selectors {
		if _, ok := slices.BinarySearch(proved, s); !ok {
			missing = append(missing, s)
		}
	}
	return missing
}

// compareEntries orders the identities of one workload. The first is its
// default identity, so the order depends on nothing that changes between
// restarts.
func compareEntries(a, b *Entry) int {
	return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.ID, b.ID))
}

// index finds the entries that a set of selectors satisfies without looking at
// the others: each entry lies in the bucket of one of its selectors, the one
// that was rarest when the entry came.
type index struct {
	buckets map[string]map[string]*Entry // selector → entry ID → entry
	home    map[string]string            // entry ID → selector
	asking  map[workload.Kinds]int       // kind → selectors of it
}

func newIndex() index {
	return index{buckets: map[string]map[string]*Entry{}, home: map[string]string{}, asking: map[workload.Kinds]int{}}
}

func (x *index) add(e *Entry) {
	if len(e.Selectors) == 0 {
		return
	}
	home := slices.MinFunc(e.Selectors, func(a, b string) int {
		return cmp.Or(cmp.Compare(len(x.buckets[a]), len(x.buckets[b])), cmp.Compare(commonness(a), commonness(b)))
	})
	if x.buckets[home] == nil {
		x.buckets[home] = map[string]*Entry{}
	}
	x.buckets[home][e.ID] = e
	x.home[e.ID] = home
	x.count(e, 1)
}

func (x *index) remove(e *Entry) {
	home, ok := x.home[e.ID]
	if !ok {
		return
	}
	delete(x.home, e.ID)
	delete(x.buckets[home], e.ID)
	if len(x.buckets[home]) == 0 {
		delete(x.buckets, home)
	}
	x.count(e, -1)
}

// count adds or takes away the kinds that e asks for.
func (x *index) count(e *Entry, n int) {
	for _, s := range e.Selectors {
		if kind := workload.KindOf(s); kind != 0 {
			if x.asking[kind] += n; x.asking[kind] == 0 {
				delete(x.asking, kind)
			}
		}
	}
}

// wants are the kinds that some entry asks for.
func (x *index) wants() (kinds workload.Kinds) {
	for kind := range x.asking {
		kinds |= kind
	}
	return kinds
}

// unread are the kinds that some entry asks for, and the proof does not speak
// of.
func (x *index) unread(proof workload.Proof) workload.Kinds { return x.wants() &^ proof.Read }

// match returns the entries that proved (sorted) satisfies, in their order.
func (x *index) match(proved []string, now time.Time) []*Entry {
	var found []*Entry
	last := ""
	for _, s := range proved {
		if s == last {
			continue
		}
		last = s
		for _, e := range x.buckets[s] {
			if !e.Expired(now) && e.MatchedBy(proved) {
				found = append(found, e)
			}
		}
	}
	slices.SortFunc(found, compareEntries)
	return found
}

// commonness ranks selectors by how many workloads share them, where the
// buckets do not tell yet.
func commonness(selector string) int {
	switch {
	case workload.KindOf(selector) == workload.Digest, strings.HasPrefix(selector, "unix:path:"), strings.HasPrefix(selector, "systemd:unit:"),
		strings.HasPrefix(selector, "container:id:"), strings.HasPrefix(selector, "k8s:pod-uid:"):
		return 0
	default:
		return 1
	}
}
