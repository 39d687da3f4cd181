// Package replica keeps the records of the CA's replicas: who may issue beside
// the root holder, under which authorities, and with which keys it signs
// JWT-SVIDs and policy bundles. The root holder writes a record when it
// certifies a replica; whoever can write the store alone gains nothing by one,
// since what counts in it is signed under the root.
package replica

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"time"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// Prefix is where the store keeps records of replicas, by name.
const Prefix = "replica/"

// MarkKey is written whenever a replica comes or goes, so that everyone hears
// that the set of policy keys is another.
const MarkKey = "policy/keys"

const encodingVersion = 1

// MaxAuthorities is how many living intermediates a replica may have. None is
// forgotten before it ends, or an eviction would not reach it. Two or three are
// usual: intermediates are renewed at half of their life, or when another root
// becomes active.
const MaxAuthorities = 64

var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// Record is one replica. It is immutable.
type Record struct {
	Name string
	// RootHolder: it has the root key.
	RootHolder bool
	// Realm is that of a nested CA, which has a store of its own; 0: it shares one.
	Realm    uint32
	JoinedAt time.Time
	// Authorities are its intermediates, the current one last.
	Authorities []Authority
	// JWTKeyID names its key in the trust bundle.
	JWTKeyID string
	// PolicyCertificate is its policy key under the root, DER.
	PolicyCertificate []byte
	// Revision is that of the transaction that wrote the record.
	Revision uint64
}

// Authority is one intermediate of a replica.
type Authority struct {
	// ID is the hex subject key ID, as in revocations.
	ID string `json:"id"`
	// Root is the ID of the root above it; empty in records of an older Merlon,
	// which knew one root only.
	Root     string    `json:"root,omitempty"`
	NotAfter time.Time `json:"not_after"`
}

type stored struct {
	Version           int         `json:"v"`
	Name              string      `json:"name"`
	RootHolder        bool        `json:"root_holder,omitempty"`
	Realm             uint32      `json:"realm,omitempty"`
	JoinedAt          time.Time   `json:"joined_at"`
	Authorities       []Authority `json:"authorities"`
	JWTKeyID          string      `json:"jwt_key_id"`
	PolicyCertificate []byte      `json:"policy_certificate"`
}

// CheckName says why name cannot name a replica, as an *entry.InvalidError.
func CheckName(name string) error {
	if !validName.MatchString(name) {
		return &entry.InvalidError{Field: "replica_name", Reason: fmt.Sprintf("%.80q: want 1 to 63 of a-z, 0-9 and hyphen, beginning with a letter or digit", name)}
	}
	return nil
}

// Decode reads a stored record.
func Decode(kv store.KV) (*Record, error) {
	var s stored
	if err := json.Unmarshal(kv.Value, &s); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	if s.Version != encodingVersion {
		return nil, fmt.Errorf("decode %s: version %d is not known", kv.Key, s.Version)
	}
	if kv.Key != Prefix+s.Name || len(s.Authorities) == 0 || s.Realm > svid.MaxRealm {
		return nil, fmt.Errorf("decode %s: it is incomplete", kv.Key)
	}
	return &Record{
		Name: s.Name, RootHolder: s.RootHolder, Realm: s.Realm, JoinedAt: s.JoinedAt, Authorities: s.Authorities,
		JWTKeyID: s.JWTKeyID, PolicyCertificate: s.PolicyCertificate, Revision: kv.ModRevision,
	}, nil
}

// Read returns the record of the replica called name; store.ErrNotFound if there
// is none.
func Read(ctx context.Context, st store.Store, name string) (*Record, error) {
	kv, _, err := st.Get(ctx, Prefix+name)
	if err != nil {
		return nil, fmt.Errorf("read the record of replica %s: %w", name, err)
	}
	return Decode(kv)
}

// Put returns the write that stores r.
func (r *Record) Put() (store.Op, error) {
	b, err := json.Marshal(stored{
		Version: encodingVersion, Name: r.Name, RootHolder: r.RootHolder, Realm: r.Realm, JoinedAt: r.JoinedAt.UTC(), Authorities: r.Authorities,
		JWTKeyID: r.JWTKeyID, PolicyCertificate: r.PolicyCertificate,
	})
	if err != nil {
		return store.Op{}, fmt.Errorf("encode the record of replica %s: %w", r.Name, err)
	}
	return store.Put(Prefix+r.Name, b), nil
}

// Mark returns the write that says that a replica came or went.
func Mark() store.Op { return store.Put(MarkKey, nil) }

// Cmp holds while the stored record is r.
func (r *Record) Cmp() store.Cmp { return store.Cmp{Key: Prefix + r.Name, ModRevision: r.Revision} }

// Current is the replica's newest intermediate.
func (r *Record) Current() Authority { return r.Authorities[len(r.Authorities)-1] }

// Holds says whether the replica issues, or has issued, under authority id.
func (r *Record) Holds(id string) bool {
	return slices.ContainsFunc(r.Authorities, func(a Authority) bool { return a.ID == id })
}

// WithAuthority returns a copy whose current intermediate is a; those that
// ended before now are left out. One that is there already, as when a replica
// asks again for the same key, is replaced.
func (r *Record) WithAuthority(a Authority, now time.Time) *Record {
	next := *r
	next.Authorities = nil
	for _, old := range r.Authorities {
		switch {
		case old.ID == a.ID:
			if old.NotAfter.After(a.NotAfter) {
				a.NotAfter = old.NotAfter
			}
		case now.Before(old.NotAfter):
			next.Authorities = append(next.Authorities, old)
		}
	}
	next.Authorities = append(next.Authorities, a)
	return &next
}

// Overfull says whether a replica has more living intermediates than it may.
func (r *Record) Overfull() bool { return len(r.Authorities) > MaxAuthorities }
