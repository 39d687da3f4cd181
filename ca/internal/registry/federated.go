// Trust bundles of other trust domains in the picture, and which of them a node
// gets: those that an entry of its own federates with, and no other. And who was
// invited to follow ours.

package registry

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/index"
	"merlon.dev/ca/internal/trust"
)

// federated is the part of the picture that is about them. There are at most
// trust.MaxFederated.
type federated struct {
	byName map[string]*trust.Federated // replaced, never written to
	// changedAt is the revision at which one came, changed or went last.
	changedAt uint64
}

func (s federated) with(b *trust.Federated, revision uint64) federated {
	byName := maps.Clone(s.byName)
	if byName == nil {
		byName = make(map[string]*trust.Federated)
	}
	byName[b.TrustDomain.Name()] = b
	return federated{byName, revision}
}

func (s federated) without(name string, revision uint64) federated {
	byName := maps.Clone(s.byName)
	delete(byName, name)
	return federated{byName, revision}
}

// inOrder are all of them, by name.
func (s federated) inOrder() []*trust.Federated {
	return slices.SortedFunc(maps.Values(s.byName), func(a, b *trust.Federated) int {
		return strings.Compare(a.TrustDomain.Name(), b.TrustDomain.Name())
	})
}

// federatingGroup is where the entries below parent that federate with the trust
// domain lie. No SPIFFE ID has a space in it.
func federatingGroup(parent spiffeid.ID, td string) uint64 {
	return index.Hash(parent.String() + " " + td)
}

func federatingKey(e *entry.Entry, td string) index.Key {
	return index.ID(federatingGroup(e.ParentID, td), e.ID)
}

func federatingItems(all []*entry.Entry) (items []index.Item[*entry.Entry]) {
	for _, e := range all {
		for i, td := range e.FederatesWith {
			if slices.Contains(e.FederatesWith[:i], td) {
				continue // keys must not repeat
			}
			items = append(items, index.Item[*entry.Entry]{Key: federatingKey(e, td), Value: e})
		}
	}
	return items
}

// federate says whether any entry below one of parents federates with the trust
// domain.
func (s *entries) federate(parents []spiffeid.ID, td string) bool {
	for _, parent := range parents {
		for e := range s.federating.Group(federatingGroup(parent, td)) {
			if e.ParentID == parent && slices.Contains(e.FederatesWith, td) {
				return true
			}
		}
	}
	return false
}

// federatedNews are the trust bundles that f's node gets by pic, where the stream
// was told of others last.
func (f *Feed) federatedNews(pic *picture, parents []spiffeid.ID) (now []*trust.Federated, news bool) {
	told := strings.Builder{}
	fmt.Fprint(&told, "told of:")
	for _, b := range pic.federated.inOrder() {
		if td := b.TrustDomain.Name(); pic.entries.federate(parents, td) {
			now = append(now, b)
			fmt.Fprintf(&told, " %s@%d", td, b.Revision)
		}
	}
	if told.String() == f.federated {
		return nil, false
	}
	f.federated = told.String()
	return now, true
}

// Federated returns the trust bundles of other trust domains, by name.
func (r *Registry) Federated() []*trust.Federated { return r.pic.Load().federated.inOrder() }

// FederatedBundle returns the trust bundle of the named trust domain.
func (r *Registry) FederatedBundle(td string) (*trust.Federated, bool) {
	b, ok := r.pic.Load().federated.byName[td]
	return b, ok
}

// SharedKeys are the keys that are in the trust bundles of several trust domains, the own
// one among them.
func (r *Registry) SharedKeys() []trust.SharedKey {
	pic := r.pic.Load()
	documents := make(map[spiffeid.TrustDomain]*trust.Document, len(pic.federated.byName)+1)
	for _, b := range pic.federated.byName {
		documents[b.TrustDomain] = b.Document
	}
	if own := pic.trust; own != nil {
		documents[own.TrustDomain] = own.Document()
	}
	return trust.SharedKeys(documents)
}

// withInvite is all with i at key, or without it where it is nil.
func withInvite(all map[string]*federation.Invite, key string, i *federation.Invite) map[string]*federation.Invite {
	next := maps.Clone(all)
	if i == nil {
		delete(next, key)
		return next
	}
	if next == nil {
		next = make(map[string]*federation.Invite)
	}
	next[key] = i
	return next
}

// Invited says whether a URL that ends with reader was given out to somebody. There are
// at most trust.MaxFederated.
func (r *Registry) Invited(reader string) bool {
	for _, i := range r.pic.Load().invites {
		if i.Is(reader) {
			return true
		}
	}
	return false
}
