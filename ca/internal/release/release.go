// Package release publishes policy bundles: what was uploaded is checked, gets
// the next generation, is signed and kept in the store. A head names the
// current generation; it is swapped last, so that a reader finds whole bundles
// only.
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

// Unwrap returns what the check said.
func (e *RefusedError) Unwrap() error { return e.Err }

// Seal is what is signed with a bundle.
type Seal struct {
	Name               string
	Generation         uint64
	IssuedAt, NotAfter time.Time
}

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
	// Unsign gives back what Sign got, if the signature of signed is good and
	// seals the bundle called name.
	Unsign func(signed []byte, name string) (unsigned []byte, err error)
	// Keys are those that verify: ours, and those of other CAs that sign the
	// same bundles. Nil: none are announced.
	Keys func() []Key
	// MaxBytes bounds both the uploaded and the signed bundle.
	MaxBytes int
}

// Publisher is safe for concurrent use.
type Publisher struct {
	opts  Options
	cache atomic.Pointer[cached] // the bundle that was read last
}

type cached struct {
	head   *Head
	signed []byte
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

// Publish makes unsigned the next generation of the bundle called name. A
// bundle that is refused is a *RefusedError or an *entry.InvalidError.
func (p *Publisher) Publish(ctx context.Context, name string, unsigned []byte) (*Head, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	if len(unsigned) > p.opts.MaxBytes {
		return nil, &RefusedError{fmt.Errorf("has %d bytes; at most %d", len(unsigned), p.opts.MaxBytes)}
	}
	if err := p.opts.Check(unsigned); err != nil {
		return nil, &RefusedError{err}
	}
	for range maxAttempts {
		before, err := p.head(ctx, name)
		if err != nil && !errors.Is(err, ErrNone) {
			return nil, err
		}
		next, err := p.publishAfter(ctx, before, newHead(name, time.Now()), unsigned)
		if err != nil || next != nil {
			return next, err
		}
	}
	return nil, fmt.Errorf("publish policy bundle %s: others keep pushing", name)
}

// Renew signs each bundle again whose validity is half over at now, as a new
// generation of the same content, and returns the new heads: otherwise a policy
// that nobody has touched for a year would end, and with it every call. So it
// does with what EnterEpoch has left over.
// Nothing is written unless all of fence holds.
func (p *Publisher) Renew(ctx context.Context, now time.Time, fence ...store.Cmp) ([]*Head, error) {
	return p.renewWhere(ctx, renewal{now: now, fence: fence, unsign: p.opts.Unsign, due: func(h *Head, revision uint64) bool {
		return now.After(h.IssuedAt.Add(h.NotAfter.Sub(h.IssuedAt)/2)) || store.BeforeEpoch(revision, h.Generation)
	}})
}

// EnterEpoch gives each bundle of a store that was restored (store.Epoch) a
// generation above all that the lost revisions can have had, with the same
// content, and returns the new heads. Elsewhere it does nothing. The CA calls
// it before it serves.
func (p *Publisher) EnterEpoch(ctx context.Context, now time.Time) ([]*Head, error) {
	return p.renewWhere(ctx, renewal{now: now, unsign: p.opts.Unsign, due: func(h *Head, revision uint64) bool {
		return store.BeforeEpoch(revision, h.Generation)
	}})
}

// Reseal signs each bundle again that unsign gives back, as a new generation of
// the same content, and returns the new heads. Others stay as they are.
func (p *Publisher) Reseal(ctx context.Context, now time.Time, unsign func(signed []byte, name string) ([]byte, error)) ([]*Head, error) {
	return p.renewWhere(ctx, renewal{
		now: now, due: func(*Head, uint64) bool { return true },
		unsign: func(signed []byte, name string) ([]byte, error) {
			unsigned, err := unsign(signed, name)
			if err != nil {
				return nil, errNotOurs
			}
			return unsigned, nil
		},
	})
}

// errNotOurs: the bundle is not one that is to be signed again.
var errNotOurs = errors.New("signed by another key")

// renewal is one round over all bundles.
type renewal struct {
	now    time.Time
	due    func(h *Head, revision uint64) bool // in a store at revision
	unsign func(signed []byte, name string) (unsigned []byte, err error)
	fence  []store.Cmp
}

// renewWhere renews the bundles that are due.
func (p *Publisher) renewWhere(ctx context.Context, r renewal) ([]*Head, error) {
	kvs, revision, _, err := p.opts.Store.List(ctx, HeadPrefix, "", maxNames, 0)
	if err != nil {
		return nil, fmt.Errorf("list policy bundles: %w", err)
	}
	var renewed []*Head
	var errs []error
	for _, kv := range kvs {
		h, err := DecodeHead(kv)
		if err == nil && r.due(h, revision) {
			if h, err = p.renew(ctx, h, r); h != nil {
				renewed = append(renewed, h)
			}
		}
		if !errors.Is(err, errNotOurs) {
			errs = append(errs, err) // the others are renewed all the same
		}
	}
	return renewed, errors.Join(errs...)
}

// renew returns nil when somebody pushed meanwhile.
func (p *Publisher) renew(ctx context.Context, before *Head, r renewal) (*Head, error) {
	signed, err := p.readBlob(ctx, before)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil // replaced twice since the listing
	}
	if err != nil {
		return nil, err
	}
	// Only what this CA signed: who can write the store alone must not have
	// his policy signed.
	unsigned, err := r.unsign(signed, before.Name)
	if err != nil {
		return nil, fmt.Errorf("renew policy bundle %s: %w", before.Name, err)
	}
	return p.publishAfter(ctx, before, newHead(before.Name, r.now), unsigned, r.fence...)
}

func newHead(name string, now time.Time) *Head {
	now = now.UTC().Truncate(time.Second)
	return &Head{Name: name, IssuedAt: now, NotAfter: now.Add(validity)}
}

// publishAfter makes next the head that follows before. It returns nil when
// somebody else swapped the head first, or fence does not hold.
func (p *Publisher) publishAfter(ctx context.Context, before, next *Head, unsigned []byte, fence ...store.Cmp) (*Head, error) {
	name := next.Name
	swap := store.Cmp{Key: HeadPrefix + name}
	var last uint64
	if before != nil {
		last, next.Previous, swap.ModRevision = before.Generation, before.Blob, before.Revision
	}
	revision, err := p.opts.Store.Revision(ctx)
	if err != nil {
		return nil, fmt.Errorf("number policy bundle %s: %w", name, err)
	}
	next.Generation = store.InEpoch(revision, last)
	signed, err := p.opts.Sign(unsigned, Seal{Name: name, Generation: next.Generation, IssuedAt: next.IssuedAt, NotAfter: next.NotAfter})
	if err != nil {
		return nil, fmt.Errorf("sign policy bundle %s: %w", name, err)
	}
	if err := p.writeBlob(ctx, next, signed); err != nil {
		return nil, err
	}
	put, err := next.put()
	if err != nil {
		return nil, err
	}
	res, err := p.opts.Store.Txn(ctx, append([]store.Cmp{swap}, fence...), []store.Op{put}, nil)
	if err != nil {
		return nil, fmt.Errorf("store the head of policy bundle %s: %w", name, err)
	}
	if !res.Succeeded {
		p.dropBlob(ctx, next.Blob)
		return nil, nil
	}
	next.Revision = res.Revision
	p.cache.Store(&cached{next, signed})
	if before != nil && before.Previous != "" {
		p.dropBlob(ctx, before.Previous)
	}
	return next, nil
}

// writeBlob stores the signed bytes under a name of their own, so that two
// pushes never mix.
func (p *Publisher) writeBlob(ctx context.Context, h *Head, signed []byte) error {
	sum := sha256.Sum256(signed)
	h.SHA256, h.SizeBytes = hex.EncodeToString(sum[:]), len(signed)
	var random [8]byte
	rand.Read(random[:]) // never fails, see crypto/rand
	h.Blob = fmt.Sprintf("%012x-%x", h.IssuedAt.Unix(), random)
	for len(signed) > 0 {
		n := min(len(signed), chunkBytes)
		if _, err := p.opts.Store.Txn(ctx, nil, []store.Op{store.Put(chunkKey(h.Blob, h.Chunks), signed[:n])}, nil); err != nil {
			return fmt.Errorf("store policy bundle %s: %w", h.Name, err)
		}
		signed = signed[n:]
		h.Chunks++
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
// called name, and their head; ErrNone if there is none. Do not change them.
func (p *Publisher) Current(ctx context.Context, name string) ([]byte, *Head, error) {
	for range maxAttempts {
		h, err := p.head(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		if c := p.cache.Load(); c != nil && c.head.Name == name && c.head.Revision == h.Revision {
			return c.signed, c.head, nil
		}
		signed, err := p.readBlob(ctx, h)
		if errors.Is(err, store.ErrNotFound) {
			continue // two pushes since the head was read
		}
		if err != nil {
			return nil, nil, err
		}
		p.cache.Store(&cached{h, signed})
		return signed, h, nil
	}
	return nil, nil, fmt.Errorf("read policy bundle %s: it keeps changing", name)
}

func (p *Publisher) readBlob(ctx context.Context, h *Head) ([]byte, error) {
	var buf bytes.Buffer
	for i := range h.Chunks {
		kv, _, err := p.opts.Store.Get(ctx, chunkKey(h.Blob, i))
		if err != nil {
			return nil, fmt.Errorf("read policy bundle %s: %w", h.Name, err)
		}
		buf.Write(kv.Value)
	}
	if sum := sha256.Sum256(buf.Bytes()); hex.EncodeToString(sum[:]) != h.SHA256 {
		return nil, fmt.Errorf("read policy bundle %s: generation %d in the store is not what was signed", h.Name, h.Generation)
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
		named[h.Blob], named[h.Previous] = true, true
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
