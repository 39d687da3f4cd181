// Package approval is the four-eyes rule: an act that touches the CA's keys waits,
// as a proposal in the store, until a second administrator grants it
// (SECURITY.md T46). It decides what a proposal is, in which state, whose grant
// counts, and that the act and the end of its proposal are one transaction. Which
// acts wait says ca/capb; who holds which role, ca/internal/api.
//
//	open ── granted, and done ──> done
//	 ├───── withdrawn ──────────> withdrawn
//	 ├───── the world changed ──> void
//	 └───── Life is over: good for nothing, whatever is written
//
// No state leads back.
package approval

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// Where the store keeps all of this: proposals by ID, and which replicas are
// configured to ask for a second administrator.
const (
	Prefix         = "approval/"
	proposalPrefix = Prefix + "proposal/"
	requiredPrefix = Prefix + "required/"
)

const (
	// Life is how long a proposal can be granted.
	Life = time.Hour
	// kept is how long an ended one can say what became of it.
	kept = 24 * time.Hour
	// maxOpen is how many one administrator can have open.
	maxOpen = 16

	encodingVersion = 1
	idBytes         = 16
)

// State is where a proposal stands.
type State string

// The states. Nothing leaves the last three.
const (
	Open      State = "open"
	Done      State = "done"
	Withdrawn State = "withdrawn"
	Void      State = "void"
)

// Person is who proposes or grants, as far as it can be told.
type Person struct {
	// Principal is whom they count as: two names of one principal are one person.
	Principal string `json:"principal"`
	// Name and Role are as the audit log has them.
	Name string `json:"name"`
	Role string `json:"role"`
	// What was shown, one of them, by which the role can be judged again.
	UID   *uint32  `json:"uid,omitempty"`
	SVID  *Shown   `json:"svid,omitempty"`
	Token *Claimed `json:"token,omitempty"`
}

// Shown is what revocations are compared with of an X509-SVID.
type Shown struct {
	SPIFFEID     string      `json:"spiffe_id"`
	Serial       svid.Serial `json:"serial"`
	OurSerial    bool        `json:"our_serial"`
	SerialHex    string      `json:"serial_hex"`
	AuthorityIDs []string    `json:"authority_ids"`
	NotBefore    time.Time   `json:"not_before"`
}

// Claimed are the claims of a token by which it had its roles.
type Claimed struct {
	Issuer string              `json:"issuer"`
	Claims []map[string]string `json:"claims"`
}

// Terms are what is proposed, by whom and on what. They do not change: a
// proposal's ID is a hash of them, so that under the ID which the second
// administrator read nothing else can be done.
type Terms struct {
	// Nonce tells two proposals of one act apart.
	Nonce []byte `json:"nonce"`
	// Method is the RPC's full name, Request its message in deterministic encoding.
	Method  string `json:"method"`
	Request []byte `json:"request"`
	// Act is what the audit log calls it.
	Act string `json:"act"`
	// Basis says on which state of the world it rests; where that is another, the
	// proposal is void.
	Basis string    `json:"basis,omitempty"`
	By    Person    `json:"by"`
	At    time.Time `json:"at"`
	Until time.Time `json:"until"`
}

// Proposal is an act that waits, or has waited. It is immutable.
type Proposal struct {
	ID string
	Terms
	State State
	// EndedBy is who ended it, and EndedIn the act by which, as the audit log names
	// it. Reason is why it is void.
	EndedBy, EndedIn, Reason string
	// Revision is that of the transaction that wrote it; 0: none did.
	Revision uint64

	encoded []byte // the terms, as ID is the hash of them
}

type stored struct {
	Version int             `json:"v"`
	Terms   json.RawMessage `json:"terms"`
	State   State           `json:"state"`
	EndedBy string          `json:"ended_by,omitempty"`
	EndedIn string          `json:"ended_in,omitempty"`
	Reason  string          `json:"reason,omitempty"`
}

// New makes an open proposal of t at now, whose nonce and times it sets.
func New(t Terms, now time.Time) (*Proposal, error) {
	t.Nonce = make([]byte, idBytes)
	rand.Read(t.Nonce) // never fails, see crypto/rand
	t.At, t.Until = now.UTC(), now.Add(Life).UTC()
	encoded, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("encode a proposal: %w", err)
	}
	return &Proposal{ID: idOf(encoded), Terms: t, State: Open, encoded: encoded}, nil
}

func idOf(terms []byte) string {
	sum := sha256.Sum256(terms)
	return hex.EncodeToString(sum[:idBytes])
}

// ValidID says whether id can be that of a proposal.
func ValidID(id string) bool {
	raw, err := hex.DecodeString(id)
	return err == nil && len(raw) == idBytes && hex.EncodeToString(raw) == id
}

// Decode reads a stored proposal. One whose terms are not those of its ID is none.
func Decode(kv store.KV) (*Proposal, error) {
	var s stored
	if err := json.Unmarshal(kv.Value, &s); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	p := &Proposal{ID: idOf(s.Terms), State: s.State, EndedBy: s.EndedBy, EndedIn: s.EndedIn, Reason: s.Reason, Revision: kv.ModRevision, encoded: s.Terms}
	switch {
	case s.Version != encodingVersion:
		return nil, fmt.Errorf("decode %s: version %d is not known", kv.Key, s.Version)
	case kv.Key != proposalPrefix+p.ID:
		return nil, fmt.Errorf("decode %s: it does not say what was proposed under this ID", kv.Key)
	case s.State != Open && s.State != Done && s.State != Withdrawn && s.State != Void:
		return nil, fmt.Errorf("decode %s: state %q is not known", kv.Key, s.State)
	}
	if err := json.Unmarshal(s.Terms, &p.Terms); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	if again, err := json.Marshal(p.Terms); err != nil || !bytes.Equal(again, s.Terms) {
		return nil, fmt.Errorf("decode %s: it says more than is understood", kv.Key)
	}
	if p.By.Principal == "" || p.Method == "" {
		return nil, fmt.Errorf("decode %s: it is incomplete", kv.Key)
	}
	return p, nil
}

// put is the write that stores p.
func (p *Proposal) put() (store.Op, error) {
	b, err := json.Marshal(stored{encodingVersion, p.encoded, p.State, p.EndedBy, p.EndedIn, p.Reason})
	if err != nil {
		return store.Op{}, fmt.Errorf("encode proposal %s: %w", p.ID, err)
	}
	return store.Put(proposalPrefix+p.ID, b), nil
}

// cmp holds while the stored proposal is p.
func (p *Proposal) cmp() store.Cmp {
	return store.Cmp{Key: proposalPrefix + p.ID, ModRevision: p.Revision}
}

// ended returns p in the state to, which by brought about in the act named in.
func (p *Proposal) ended(to State, by, in, reason string) *Proposal {
	next := *p
	next.State, next.EndedBy, next.EndedIn, next.Reason = to, by, in, reason
	return &next
}

// Expired says whether it is too late for p at now.
func (p *Proposal) Expired(now time.Time) bool { return !now.Before(p.Until) }

// stale says whether nobody asks for p any more.
func (p *Proposal) stale(now time.Time) bool { return !now.Before(p.Until.Add(kept)) }

// Waits says why p waits for nobody at now, as a *RefusedError; nil: it does.
func (p *Proposal) Waits(now time.Time) error {
	switch {
	case p.State == Done:
		return p.refused(WhyDone, "was granted by %s, and done", p.EndedBy)
	case p.State == Withdrawn:
		return p.refused(WhyWithdrawn, "was withdrawn by %s", p.EndedBy)
	case p.State != Open:
		return p.refused(WhyVoid, "is void: %s", p.Reason)
	case p.Expired(now):
		return p.refused(WhyExpired, "waited until %s, and was not granted", p.Until.UTC().Format(time.RFC3339))
	}
	return nil
}

// Grantable says why second cannot grant p at now, as a *RefusedError.
func (p *Proposal) Grantable(second Person, now time.Time) error {
	if err := p.Waits(now); err != nil {
		return err
	}
	if second.Principal == "" || second.Principal == p.By.Principal || second.UID != nil && p.By.UID != nil && *second.UID == *p.By.UID {
		return p.refused(WhyOwn, "is by %s, and takes another administrator: %s counts as the same one", p.By.Name, second.Name)
	}
	return nil
}

// Why is a reason of a refusal, for programs.
type Why string

// The reasons.
const (
	WhyUnknown   Why = "unknown"
	WhyExpired   Why = "expired"
	WhyDone      Why = "done"
	WhyWithdrawn Why = "withdrawn"
	WhyOwn       Why = "own"
	WhyVoid      Why = "void"
	WhyTooMany   Why = "too many"
)

// RefusedError says why a proposal is not granted, withdrawn or made.
type RefusedError struct {
	Why    Why
	Reason string
}

// Error implements error.
func (e *RefusedError) Error() string { return e.Reason }

func (p *Proposal) refused(why Why, format string, args ...any) error {
	return &RefusedError{why, "proposal " + p.ID + " (" + p.Act + ") " + fmt.Sprintf(format, args...)}
}
