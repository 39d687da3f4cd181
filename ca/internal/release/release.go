// Package release publishes policy bundles: what was uploaded is checked, gets
// the next generation, is signed and kept in the store. A head names the
// generation in force, those before it, and a candidate that is tried beside it; it
// is swapped last, so that a reader finds whole bundles only.
package release

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
)

const (
	// DefaultName is the policy bundle that is meant when none is named.
	DefaultName = "main"

	blobPrefix = "policy/blob/"
	// chunkBytes keeps values out of Badger's value log.
	chunkBytes  = 256 << 10
	maxAttempts = 16
	// validity is how long a signed generation holds. It bounds how long a
	// server that is held back in time can freeze its clients on an old policy
	// (SECURITY.md T28); a push starts it anew, and so does Renew at its half.
	validity = 366 * 24 * time.Hour
	// orphanAge is how old a blob that no head names must be to be removed: a
	// push that is under way has written its blob and not yet its head.
	orphanAge = time.Hour
	// keepGenerations is how many generations of a bundle are kept, the one in force
	// among them: so far a rollback goes back.
	keepGenerations = 10
	// maxNames bounds how many policy bundles upkeep looks at.
	maxNames = 1000
)

// validName is what policy/bundle serves.
var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// ErrNone is returned where no policy bundle of the name was ever pushed.
var ErrNone = errors.New("no such policy bundle")

// RefusedError says why an uploaded policy bundle was not published.
type RefusedError struct{ Err error }

// Error implements error.
func (e *RefusedError) Error() string { return "policy bundle: " + e.Err.Error() }

// StateError says why a policy bundle cannot be changed so as it stands.
type StateError struct{ Reason string }

// Error implements error.
func (e *StateError) Error() string { return "policy bundle: " + e.Reason }

// Unwrap returns what the check said.
func (e *RefusedError) Unwrap() error { return e.Err }

// Seal is what is signed with a bundle.
type Seal struct {
	Name               string
	Generation         uint64
	IssuedAt, NotAfter time.Time
	// Candidate: it may be tried, and is never in force.
	Candidate bool
}

// Unsign gives back what was signed, if the signature of signed is good and seals
// the bundle called name, as a candidate or not.
type Unsign func(signed []byte, name string, candidate bool) (unsigned []byte, err error)

// Key can verify what Options.Sign makes.
type Key struct {
	KID  string
	PKIX []byte // DER
}

// Options are the parts of a Publisher; all are required.
type Options struct {
	Store store.Store
	Log   *slog.Logger
	// Check says why an uploaded bundle cannot be published.
	Check func(unsigned []byte) error
	// Sign signs a checked bundle.
	Sign func(unsigned []byte, seal Seal) ([]byte, error)
	// Unsign gives back what Sign got.
	Unsign Unsign
	// Keys are those that verify: ours, and those of other CAs that sign the
	// same bundles. Nil: none are announced.
	Keys func() []Key
	// MaxBytes bounds both the uploaded and the signed bundle.
	MaxBytes int
}

// Publisher is safe for concurrent use.
type Publisher struct {
	opts Options
	// What was read last.
	current, candidate atomic.Pointer[cached]
}

type cached struct {
	release *Release
	signed  []byte
}

// New makes a publisher.
func New(o Options) *Publisher { return &Publisher{opts: o} }

// Keys are those that verify what is published now.
func (p *Publisher) Keys() []Key {
	if p.opts.Keys == nil {
		return nil
	}
	return p.opts.Keys()
}

// CheckName says why name cannot name a policy bundle, as an
// *entry.InvalidError.
func CheckName(name string) error {
	if !validName.MatchString(name) {
		return &entry.InvalidError{Field: "name", Reason: fmt.Sprintf("%.80q: want 1 to 64 of a-z, 0-9, dot, hyphen, underscore, beginning with a letter or digit", name)}
	}
	return nil
}

// Publish makes unsigned the next generation of the bundle called name; a candidate
// that there is goes. A bundle that is refused is a *RefusedError or an
// *entry.InvalidError.
func (p *Publisher) Publish(ctx context.Context, name string, unsigned []byte) (*Head, error) {
	if err := p.check(name, unsigned); err != nil {
		return nil, err
	}
	return p.edit(ctx, name, func(before *Head) (draft, error) {
		next := before.succeed(name, newRelease(Pushed, time.Now()))
		return draft{next, []toSeal{{&next.Release, false, unsigned}}}, nil
	})
}

func (p *Publisher) check(name string, unsigned []byte) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if len(unsigned) > p.opts.MaxBytes {
		return &RefusedError{fmt.Errorf("has %d bytes; at most %d", len(unsigned), p.opts.MaxBytes)}
	}
	if err := p.opts.Check(unsigned); err != nil {
		return &RefusedError{err}
	}
	return nil
}

// draft is a head that is to be, with what of it has yet to be signed.
type draft struct {
	next  *Head
	seals []toSeal
}

// toSeal is content that becomes a release of the draft's head.
type toSeal struct {
	release   *Release
	candidate bool
	unsigned  []byte
}

// edit makes the head of name what change makes of it, nil for none; again, while
// others are faster. A draft without a head leaves it as it is.
func (p *Publisher) edit(ctx context.Context, name string, change func(before *Head) (draft, error)) (*Head, error) {
	for range maxAttempts {
		before, err := p.head(ctx, name)
		if err != nil && !errors.Is(err, ErrNone) {
			return nil, err
		}
		d, err := change(before)
		if err != nil {
			return nil, err
		}
		if d.next == nil {
			return before, nil
		}
		next, err := p.commit(ctx, before, d)
		if err != nil || next != nil {
			return next, err
		}
	}
	return nil, fmt.Errorf("change policy bundle %s: others keep changing it", name)
}

func newRelease(how string, now time.Time) Release {
	now = now.UTC().Truncate(time.Second)
	return Release{How: how, IssuedAt: now, NotAfter: now.Add(validity)}
}

// commit signs what d says, stores it, and then swaps the head: whoever is killed on
// the way leaves the one before. It returns nil when somebody else swapped the head
// first, or fence does not hold.
func (p *Publisher) commit(ctx context.Context, before *Head, d draft, fence ...store.Cmp) (*Head, error) {
	next, swap := d.next, store.Cmp{Key: HeadPrefix + d.next.Name}
	if before != nil {
		next.Last, swap.ModRevision = before.Last, before.Revision
	}
	revision, err := p.opts.Store.Revision(ctx)
	if err != nil {
		return nil, fmt.Errorf("number policy bundle %s: %w", next.Name, err)
	}
	for _, s := range d.seals {
		next.Last = store.InEpoch(revision, next.Last)
		s.release.Generation = next.Last
		if err := p.seal(ctx, next.Name, s); err != nil {
			return nil, err
		}
	}
	put, err := next.put()
	if err != nil {
		return nil, err
	}
	res, err := p.opts.Store.Txn(ctx, append([]store.Cmp{swap}, fence...), []store.Op{put}, nil)
	if err != nil {
		return nil, fmt.Errorf("store the head of policy bundle %s: %w", next.Name, err)
	}
	unnamed, kept := before.blobs(), next.blobs()
	if !res.Succeeded {
		unnamed, kept = kept, unnamed
	}
	for _, blob := range unnamed {
		if !slices.Contains(kept, blob) {
			p.dropBlob(ctx, blob)
		}
	}
	if !res.Succeeded {
		return nil, nil
	}
	next.Revision = res.Revision
	return next, nil
}

// seal signs and stores the content of one release.
func (p *Publisher) seal(ctx context.Context, name string, s toSeal) error {
	signed, err := p.opts.Sign(s.unsigned, Seal{
		Name: name, Generation: s.release.Generation, IssuedAt: s.release.IssuedAt, NotAfter: s.release.NotAfter, Candidate: s.candidate,
	})
	if err != nil {
		return fmt.Errorf("sign policy bundle %s: %w", name, err)
	}
	return p.writeBlob(ctx, name, s.release, signed)
}

// writeBlob stores the signed bytes under a name of their own, so that two
// pushes never mix.
func (p *Publisher) writeBlob(ctx context.Context, name string, r *Release, signed []byte) error {
	sum := sha256.Sum256(signed)
	r.SHA256, r.SizeBytes, r.Chunks = hex.EncodeToString(sum[:]), len(signed), 0
	var random [8]byte
	rand.Read(random[:]) // never fails, see crypto/rand
	r.Blob = fmt.Sprintf("%012x-%x", r.IssuedAt.Unix(), random)
	for len(signed) > 0 {
		n := min(len(signed), chunkBytes)
		if _, err := p.opts.Store.Txn(ctx, nil, []store.Op{store.Put(chunkKey(r.Blob, r.Chunks), signed[:n])}, nil); err != nil {
			return fmt.Errorf("store policy bundle %s: %w", name, err)
		}
		signed = signed[n:]
		r.Chunks++
	}
	return nil
}

func chunkKey(blob string, i int) string { return fmt.Sprintf("%s%s/%04d", blobPrefix, blob, i) }

// dropBlob removes what no head names any more. A failure costs space only:
// Prune comes by again.
func (p *Publisher) dropBlob(ctx context.Context, blob string, fence ...store.Cmp) {
	if err := p.removeKeys(ctx, blobPrefix+blob+"/", fence...); err != nil {
		p.opts.Log.LogAttrs(ctx, slog.LevelWarn, "old policy bundle not removed", slog.Any("err", err))
	}
}

func (p *Publisher) removeKeys(ctx context.Context, prefix string, fence ...store.Cmp) error {
	kvs, _, _, err := p.opts.Store.List(ctx, prefix, "", store.MaxTxnOps, 0)
	if err != nil || len(kvs) == 0 {
		return err
	}
	ops := make([]store.Op, len(kvs))
	for i, kv := range kvs {
		ops[i] = store.Delete(kv.Key)
	}
	_, err = p.opts.Store.Txn(ctx, fence, ops, nil)
	return err
}

// Current returns the signed bytes of the current generation of the bundle
// called name, and what is known of them; ErrNone if there is none. Do not change
// them.
func (p *Publisher) Current(ctx context.Context, name string) ([]byte, *Release, error) {
	return p.read(ctx, name, &p.current, func(h *Head) *Release { return &h.Release })
}

// Candidate is Current for the candidate of the bundle called name.
func (p *Publisher) Candidate(ctx context.Context, name string) ([]byte, *Release, error) {
	return p.read(ctx, name, &p.candidate, func(h *Head) *Release {
		if h.Candidate == nil {
			return nil
		}
		return &h.Candidate.Release
	})
}

// Kept returns the signed bytes of a generation of the bundle called name that is kept,
// also of its candidate; 0 is the one in force. nil: that one is not kept.
func (p *Publisher) Kept(ctx context.Context, name string, generation uint64) (signed []byte, r *Release, candidate bool, err error) {
	h, err := p.head(ctx, name)
	if err != nil {
		return nil, nil, false, err
	}
	switch {
	case generation == 0 || generation == h.Generation:
		signed, r, err = p.Current(ctx, name)
		return signed, r, false, err
	case h.Candidate != nil && generation == h.Candidate.Generation:
		r, candidate = &h.Candidate.Release, true
	default:
		for i := range h.History {
			if h.History[i].Generation == generation {
				r = &h.History[i]
			}
		}
	}
	if r == nil {
		return nil, nil, false, nil
	}
	signed, err = p.readBlob(ctx, name, r)
	if errors.Is(err, store.ErrNotFound) { // it went meanwhile
		return nil, nil, false, nil
	}
	return signed, r, candidate, err
}

// read returns the release that pick takes out of the head of name, from last if that
// holds it.
func (p *Publisher) read(ctx context.Context, name string, last *atomic.Pointer[cached], pick func(*Head) *Release) ([]byte, *Release, error) {
	for range maxAttempts {
		h, err := p.head(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		r := pick(h)
		if r == nil {
			return nil, nil, ErrNone
		}
		if c := last.Load(); c != nil && c.release.Blob == r.Blob {
			return c.signed, c.release, nil
		}
		signed, err := p.readBlob(ctx, name, r)
		if errors.Is(err, store.ErrNotFound) {
			continue // replaced since the head was read
		}
		if err != nil {
			return nil, nil, err
		}
		last.Store(&cached{r, signed})
		return signed, r, nil
	}
	return nil, nil, fmt.Errorf("read policy bundle %s: it keeps changing", name)
}

func (p *Publisher) readBlob(ctx context.Context, name string, r *Release) ([]byte, error) {
	var buf bytes.Buffer
	for i := range r.Chunks {
		kv, _, err := p.opts.Store.Get(ctx, chunkKey(r.Blob, i))
		if err != nil {
			return nil, fmt.Errorf("read policy bundle %s: %w", name, err)
		}
		buf.Write(kv.Value)
	}
	if sum := sha256.Sum256(buf.Bytes()); hex.EncodeToString(sum[:]) != r.SHA256 {
		return nil, fmt.Errorf("read policy bundle %s: generation %d in the store is not what was signed", name, r.Generation)
	}
	return buf.Bytes(), nil
}

func (p *Publisher) head(ctx context.Context, name string) (*Head, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	kv, _, err := p.opts.Store.Get(ctx, HeadPrefix+name)
	if errors.Is(err, store.ErrNotFound) {
		return nil, ErrNone
	}
	if err != nil {
		return nil, fmt.Errorf("read the head of policy bundle %s: %w", name, err)
	}
	return DecodeHead(kv)
}

// Prune removes blobs that a push left behind which never came to its head,
// while all of fence holds.
func (p *Publisher) Prune(ctx context.Context, now time.Time, fence ...store.Cmp) error {
	named := make(map[string]bool)
	heads, _, _, err := p.opts.Store.List(ctx, HeadPrefix, "", maxNames, 0)
	if err != nil {
		return fmt.Errorf("list policy bundles: %w", err)
	}
	for _, kv := range heads {
		h, err := DecodeHead(kv)
		if err != nil {
			return err
		}
		for _, blob := range h.blobs() {
			named[blob] = true
		}
	}
	blobs, err := p.blobs(ctx)
	if err != nil {
		return err
	}
	for _, blob := range blobs {
		seconds, err := strconv.ParseInt(strings.SplitN(blob, "-", 2)[0], 16, 64)
		if named[blob] || err == nil && now.Sub(time.Unix(seconds, 0)) < orphanAge {
			continue
		}
		p.dropBlob(ctx, blob, fence...)
	}
	return nil
}

// blobs lists the names of all stored blobs, one chunk at a time: their values
// are large.
func (p *Publisher) blobs(ctx context.Context) ([]string, error) {
	var names []string
	after := ""
	for {
		kvs, _, _, err := p.opts.Store.List(ctx, blobPrefix, after, 1, 0)
		if err != nil {
			return nil, fmt.Errorf("list policy bundles: %w", err)
		}
		if len(kvs) == 0 {
			return names, nil
		}
		name, _, _ := strings.Cut(strings.TrimPrefix(kvs[0].Key, blobPrefix), "/")
		names = append(names, name)
		after = blobPrefix + name + "0" // past every key below name + "/"
	}
}
