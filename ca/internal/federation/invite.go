// Invites: one operator's word to another. It holds all that the other CA needs to
// follow this one's trust bundle, the bundle itself included, so that it is exactly as
// good as the way by which it travels. The URL in it is for this one reader, so that
// this side sees whether the other comes by.

package federation

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

// InvitePrefix is where the store keeps invites, by name of the trust domain that is
// invited.
const InvitePrefix = "federation/invite/"

const (
	inviteVersion = 1
	tokenPrefix   = "merlon-federation-1." //nolint:gosec // no secret
	// MaxTokenBytes is more than a token with the largest trust bundle has.
	MaxTokenBytes = 2*trust.MaxDocumentBytes + 4096
	// InviteTTL is how long a token can be accepted. What was accepted stays.
	InviteTTL = 7 * 24 * time.Hour
	// maxSkew is how far the clocks of the two sides may be apart.
	maxSkew = time.Hour
)

// Invite is what this CA knows of another that it has invited.
type Invite struct {
	TrustDomain spiffeid.TrustDomain // the invited one
	// Reader is the last part of the URL that was given out.
	Reader string
	// Previous is that of an earlier invite by which the other side came: it counts
	// until it comes by the new one.
	Previous  string
	InvitedAt time.Time
	// FetchedAt is when it was last read, and Sequence what was read.
	FetchedAt time.Time
	Sequence  uint64
	Revision  uint64
}

type storedInvite struct {
	Version   int       `json:"v"`
	Reader    string    `json:"reader"`
	Previous  string    `json:"previous,omitempty"`
	InvitedAt time.Time `json:"invited_at"`
	FetchedAt time.Time `json:"fetched_at"`
	Sequence  uint64    `json:"sequence"`
}

// NewInvite invites td at now, in the place of held, which may be nil.
func NewInvite(td spiffeid.TrustDomain, now time.Time, held *Invite) *Invite {
	i := &Invite{TrustDomain: td, Reader: strings.ToLower(rand.Text()), InvitedAt: now.UTC()}
	if held != nil && !held.FetchedAt.IsZero() {
		i.FetchedAt, i.Sequence, i.Previous = held.FetchedAt, held.Sequence, held.Reader
		if held.Previous != "" { // the last one has not been seen
			i.Previous = held.Previous
		}
	}
	return i
}

// Is says whether reader is the other side's.
func (i *Invite) Is(reader string) bool {
	return reader != "" && (reader == i.Reader || reader == i.Previous)
}

// Saw is i after reader was given the trust bundle of that sequence at a time.
func (i *Invite) Saw(reader string, sequence uint64, at time.Time) *Invite {
	next := *i
	next.FetchedAt, next.Sequence = at.UTC(), sequence
	if reader == i.Reader {
		next.Previous = ""
	}
	return &next
}

// IsReader says whether text has the form of a reader's part of a URL.
func IsReader(text string) bool {
	if len(text) != len(rand.Text()) {
		return false
	}
	for _, c := range text {
		if (c < 'a' || c > 'z') && (c < '2' || c > '7') {
			return false
		}
	}
	return true
}

// Put is the write that keeps i.
func (i *Invite) Put() (store.Op, error) {
	value, err := json.Marshal(storedInvite{inviteVersion, i.Reader, i.Previous, i.InvitedAt, i.FetchedAt, i.Sequence})
	if err != nil {
		return store.Op{}, fmt.Errorf("encode the invite of %s: %w", i.TrustDomain, err)
	}
	return store.Put(InvitePrefix+i.TrustDomain.Name(), value), nil
}

// DecodeInvite reads the store's record.
func DecodeInvite(kv store.KV) (*Invite, error) {
	td, err := trustDomainOf(kv.Key, InvitePrefix)
	if err != nil {
		return nil, err
	}
	var stored storedInvite
	if err := decode(kv, &stored); err != nil {
		return nil, err
	}
	if stored.Version != inviteVersion || !IsReader(stored.Reader) || stored.Previous != "" && !IsReader(stored.Previous) {
		return nil, fmt.Errorf("decode %s: it is of another version", kv.Key)
	}
	return &Invite{td, stored.Reader, stored.Previous, stored.InvitedAt, stored.FetchedAt, stored.Sequence, kv.ModRevision}, nil
}

// Token is what the other side is given.
type Token struct {
	// For is the trust domain that is invited: no other takes it.
	For string `json:"for"`
	// TrustDomain is the one that invites, and the rest where its bundle is.
	TrustDomain string          `json:"trust_domain"`
	URL         string          `json:"url"`
	Profile     Profile         `json:"profile"`
	EndpointID  string          `json:"endpoint_spiffe_id,omitempty"`
	Authorities string          `json:"web_authorities,omitempty"`
	Bundle      json.RawMessage `json:"bundle"`
	Expires     time.Time       `json:"expires"`
}

// String encodes the token, in characters that survive any terminal and mail.
func (t Token) String() (string, error) {
	text, err := json.Marshal(t)
	if err != nil {
		return "", fmt.Errorf("encode the invite for %s: %w", t.For, err)
	}
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(text), nil
}

// ParseToken reads a token at now. White space in it, as from a mail, is passed over.
// What it says is judged by whoever makes a Source of it.
func ParseToken(text string, now time.Time) (*Token, error) {
	text = strings.Join(strings.Fields(text), "")
	encoded, ok := strings.CutPrefix(text, tokenPrefix)
	switch {
	case len(text) > MaxTokenBytes:
		return nil, fmt.Errorf("it has %d bytes; at most %d", len(text), MaxTokenBytes)
	case !ok:
		return nil, fmt.Errorf("it does not begin with %s: give the line that `merlon federation invite` printed on the other side", tokenPrefix)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return nil, errors.New("it is damaged: copy all of it")
	}
	t := new(Token)
	if err := json.Unmarshal(raw, t); err != nil {
		return nil, errors.New("it is damaged: copy all of it")
	}
	// A member twice, or one that is not known, is none of ours.
	if again, err := t.String(); err != nil || again != text {
		return nil, errors.New("it is not as `merlon federation invite` writes it: have another one made")
	}
	switch {
	case !now.Before(t.Expires):
		return nil, fmt.Errorf("it expired at %s: have another one made", t.Expires.Format(time.RFC3339))
	case t.Expires.After(now.Add(InviteTTL + maxSkew)):
		return nil, fmt.Errorf("it says that it can be accepted until %s, and none can for longer than %d days: have another one made, and look at the clocks of both sides", t.Expires.Format(time.RFC3339), InviteTTL/(24*time.Hour))
	}
	return t, nil
}

// Source is the source that the token names, for this CA's trust domain own.
func (t *Token) Source(own spiffeid.TrustDomain, now time.Time) (*Source, error) {
	if t.For != own.Name() {
		return nil, fmt.Errorf("it invites %.80q, and this CA is of %s", t.For, own)
	}
	td, err := spiffeid.TrustDomainFromString(t.TrustDomain)
	if err != nil || td.Name() != t.TrustDomain {
		return nil, fmt.Errorf("it comes from %.80q, which is no trust domain", t.TrustDomain)
	}
	s := &Source{TrustDomain: td, URL: t.URL, Profile: t.Profile, Authorities: t.Authorities, SetAt: now.UTC()}
	if t.EndpointID != "" {
		if s.EndpointID, err = spiffeid.FromString(t.EndpointID); err != nil {
			return nil, fmt.Errorf("endpoint_spiffe_id: %w", err)
		}
	}
	return s, s.Check()
}
