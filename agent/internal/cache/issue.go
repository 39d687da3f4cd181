// X509-SVIDs: ordered when a workload first asks, with keys made here, renewed
// at half of their life while a stream is open for them, never served when
// expired or revoked.

package cache

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net/url"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

const (
	// maxBatch is how many CSRs one request carries at most.
	maxBatch = 100
	// maxSigning is how many requests are on their way at the same time.
	maxSigning = 4
	// signTimeout bounds one request.
	signTimeout = 15 * time.Second

	firstRetry = 100 * time.Millisecond
	lastRetry  = 15 * time.Second

	// lookInterval is how often the wall clock is looked at. Timers follow
	// another clock, which stands still while a machine sleeps and knows nothing
	// of a corrected one (SECURITY.md T41); SVIDs expire by the wall clock.
	lookInterval = 15 * time.Second
)

// SVID is one X509-SVID with its key. It is immutable.
type SVID struct {
	Entry *Entry
	// Chain is the leaf and then the intermediates, DER, one after the other.
	Chain []byte
	// Key is PKCS#8, DER; nil: the workload has it.
	Key  []byte
	Peer *svid.Peer

	renewAt time.Time
}

// slotKey says whose SVID is in a slot: of the entry, for everybody whom the agent
// gives the key; or for one stream, whose workload holds the key.
type slotKey struct {
	entryID string
	holder  *Subscription
}

// slot is the place of one entry's SVID. All fields are guarded by Cache.mu.
type slot struct {
	key   slotKey
	entry *Entry
	svid  *SVID // nil: none that may be served
	users map[*Subscription]struct{}

	ordered  bool // in the queue, or on its way to the CA
	outdated bool // what is on its way is not what is wanted any more
	reissue  bool // svid may be served, and a new one is wanted now
	failures int  // since the last success
	nextTry  time.Time
	timer    *time.Timer

	// Of a key that the workload holds: whether it was asked for a CSR, that CSR
	// and its key, and why the last came to nothing.
	asked   bool
	wishes  uint64 // how often
	csr     []byte
	public  publicKey
	refusal string
}

// pending says that the first answer is still to come.
func (sl *slot) pending() bool { return sl.svid == nil && sl.failures == 0 }

// withdraw stops serving the SVID; another one is wanted.
func (sl *slot) withdraw() {
	sl.svid = nil
	sl.renew()
}

// renew asks for another SVID without giving up the one that is held.
func (sl *slot) renew() {
	sl.reissue = true
	sl.failures, sl.nextTry = 0, time.Time{}
	sl.outdated = sl.ordered
}

func (sl *slot) notifyUsers() {
	for s := range sl.users {
		s.notify()
	}
}

// slotFor returns the slot of e for holder; nil: whose key the agent makes. c.mu
// is held.
func (c *Cache) slotFor(e *Entry, holder *Subscription) *slot {
	key := slotKey{e.ID, holder}
	sl := c.slots[key]
	if sl == nil {
		sl = &slot{key: key, entry: e, users: map[*Subscription]struct{}{}}
		if holder == nil {
			sl.svid = c.takeKept(e)
		}
		c.addSlot(sl)
	}
	return sl
}

func (c *Cache) addSlot(sl *slot) {
	c.slots[sl.key] = sl
	if c.slotsOf[sl.key.entryID] == nil {
		c.slotsOf[sl.key.entryID] = map[*slot]struct{}{}
	}
	c.slotsOf[sl.key.entryID][sl] = struct{}{}
}

// removeSlot forgets one SVID. c.mu is held.
func (c *Cache) removeSlot(sl *slot) {
	sl.stopTimer()
	delete(c.slots, sl.key)
	if delete(c.slotsOf[sl.key.entryID], sl); len(c.slotsOf[sl.key.entryID]) == 0 {
		delete(c.slotsOf, sl.key.entryID)
	}
}

// dropSlots forgets an entry's SVIDs. c.mu is held.
func (c *Cache) dropSlots(id string) {
	delete(c.kept, id)
	for sl := range c.slotsOf[id] {
		c.removeSlot(sl)
	}
}

func (sl *slot) stopTimer() {
	if sl.timer != nil {
		sl.timer.Stop()
		sl.timer = nil
	}
}

// entryChanged carries a changed entry over to its slots. c.mu is held.
func (c *Cache) entryChanged(old, e *Entry) {
	for sl := range c.slotsOf[e.ID] {
		c.carryOver(sl, old, e)
	}
}

func (c *Cache) carryOver(sl *slot, old, e *Entry) {
	sl.entry = e
	if allowed := e.AgentKey && sl.key.holder == nil || e.OwnKey && sl.key.holder != nil; !allowed {
		c.removeSlot(sl)
		return
	}
	switch {
	case old.SPIFFEID != e.SPIFFEID:
		sl.withdraw()
	case old.certificate != e.certificate:
		sl.renew()
	case sl.svid != nil:
		same := *sl.svid
		same.Entry = e
		sl.svid = &same
	}
	c.turn(sl)
}

// turn moves a slot on after whatever happened to it: it gives up an expired
// SVID, orders a new one when it is time and somebody wants it, and sets the
// timer for the next turn. c.mu is held.
func (c *Cache) turn(sl *slot) {
	sl.stopTimer()
	if c.closed || c.slots[sl.key] != sl {
		return
	}
	now := time.Now()
	if sl.svid != nil && !now.Before(sl.svid.Peer.NotAfter) {
		sl.svid = nil
		sl.notifyUsers()
	}
	var next time.Time
	switch {
	case len(sl.users) == 0 && (sl.svid == nil || sl.reissue || sl.key.holder != nil):
		if !sl.ordered {
			c.removeSlot(sl)
		}
		return
	case len(sl.users) > 0 && !sl.ordered:
		due := sl.due()
		if !now.Before(due) {
			c.order(sl)
		} else {
			next = due
		}
	}
	if sl.svid != nil && (next.IsZero() || sl.svid.Peer.NotAfter.Before(next)) {
		next = sl.svid.Peer.NotAfter
	}
	if !next.IsZero() {
		sl.timer = time.AfterFunc(next.Sub(now), func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.turn(sl)
		})
	}
}

// due is when the next SVID is to be ordered.
func (sl *slot) due() time.Time {
	if sl.svid == nil || sl.reissue || sl.svid.renewAt.Before(sl.nextTry) {
		return sl.nextTry
	}
	return sl.svid.renewAt
}

func (c *Cache) order(sl *slot) {
	if sl.key.holder != nil && sl.csr == nil {
		if !sl.asked {
			sl.asked = true
			sl.wishes++
			sl.notifyUsers()
		}
		return
	}
	sl.ordered = true
	c.queue = append(c.queue, sl)
	signal(c.wake)
}

// TryAgain orders at once what failed while there was no CA to ask. Call it when
// there is one: calls to it must not fail any more for want of a connection.
func (c *Cache) TryAgain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.returns++
	for _, sl := range c.slots {
		if sl.failures > 0 {
			sl.nextTry = time.Time{}
			c.turn(sl)
		}
	}
}

// Run orders SVIDs until ctx ends. Call it once.
func (c *Cache) Run(ctx context.Context) error {
	var signing sync.WaitGroup
	free := make(chan struct{}, maxSigning)
	look := time.NewTicker(lookInterval)
	defer func() {
		look.Stop()
		signing.Wait()
		c.stop()
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			c.catchUp()
			continue
		case <-c.wake:
		}
		for {
			select {
			case <-ctx.Done():
				return nil
			case free <- struct{}{}:
			}
			// Taken only now: what came while all were busy travels together.
			batch := c.takeBatch()
			if len(batch) == 0 {
				<-free
				break
			}
			signing.Go(func() {
				defer func() { <-free }()
				c.issue(ctx, batch)
			})
		}
	}
}

// catchUp does what timers should have done by now.
func (c *Cache) catchUp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, sl := range c.slots {
		c.turn(sl)
	}
	now := time.Now()
	for id := range c.expiries {
		if e := c.entries[id]; e.Expired(now) {
			c.expired(e)
		}
	}
}

// stop ends all timers.
func (c *Cache) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, sl := range c.slots {
		sl.stopTimer()
	}
	for _, t := range c.expiries {
		t.Stop()
	}
}

// want is one SVID on its way.
type want struct {
	slot    *slot
	entry   *Entry
	csr     []byte
	public  publicKey
	pkcs8   []byte // nil: the workload has the key
	returns uint64 // of the CA, when it was taken from the queue
}

// publicKey is what the keys of package crypto have in common.
type publicKey interface {
	Equal(other crypto.PublicKey) bool
}

func (c *Cache) takeBatch() []want {
	c.mu.Lock()
	defer c.mu.Unlock()
	var batch []want
	for len(c.queue) > 0 && len(batch) < maxBatch {
		sl := c.queue[0]
		c.queue[0] = nil
		c.queue = c.queue[1:]
		if c.slots[sl.key] == sl {
			sl.outdated = false
			batch = append(batch, want{slot: sl, entry: sl.entry, csr: sl.csr, public: sl.public, returns: c.returns})
			sl.csr, sl.public = nil, nil
		}
	}
	return batch
}

// issue gets the SVIDs of a batch from the CA.
func (c *Cache) issue(ctx context.Context, batch []want) {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	items := make([]*capb.SignItem, len(batch))
	for i := range batch {
		w := &batch[i]
		if w.csr == nil {
			if err := w.makeKey(); err != nil {
				c.settleAll(ctx, batch, err)
				return
			}
		}
		items[i] = &capb.SignItem{EntryId: w.entry.ID, Csr: w.csr}
	}
	results, err := c.authority.Sign(ctx, items)
	if err == nil && len(results) != len(items) {
		err = fmt.Errorf("sign: %d answers to %d requests", len(results), len(items))
	}
	if err != nil {
		c.settleAll(ctx, batch, err)
		return
	}
	for i, w := range batch {
		made, err := c.accept(&w, results[i])
		c.settle(ctx, w, made, err)
	}
}

// makeKey makes the key, which never leaves the node, and its CSR. The CA
// takes nothing but the public key from the CSR; the URI is for its readers.
func (w *want) makeKey() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	if w.pkcs8, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return fmt.Errorf("encode a key: %w", err)
	}
	w.public = &key.PublicKey
	w.csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		URIs: []*url.URL{w.entry.SPIFFEID.URL()},
	}, key)
	if err != nil {
		return fmt.Errorf("make a CSR: %w", err)
	}
	return nil
}

// accept checks that the CA's answer is an SVID for what was asked: it would
// otherwise reach a workload under another name, or without its key.
func (c *Cache) accept(w *want, r *capb.SignResult) (*SVID, error) {
	if code := codes.Code(r.GetCode()); code != codes.OK {
		return nil, status.Error(code, r.GetMessage())
	}
	trust := c.trust.Load()
	if trust == nil {
		return nil, errors.New("no trust bundle to verify the SVID with")
	}
	now := time.Now()
	peer, err := svid.VerifyRawChain(r.GetX509Svid(), trust.Bundle, now)
	if err != nil {
		return nil, fmt.Errorf("verify the SVID from the CA: %w", err)
	}
	if peer.ID != w.entry.SPIFFEID {
		return nil, fmt.Errorf("the CA signed %s, asked for was %s", peer.ID, w.entry.SPIFFEID)
	}
	if !w.public.Equal(peer.Leaf.PublicKey) {
		return nil, errors.New("the CA signed another key")
	}
	if warning := r.GetWarning(); warning != "" {
		c.log.Warn("SVID lives shorter than its registration entry asks for", slog.String("spiffe_id", peer.ID.String()),
			slog.String("entry_id", w.entry.ID), slog.Time("not_after", peer.NotAfter), slog.String("reason", warning))
	}
	made := &SVID{Entry: w.entry, Key: w.pkcs8, Peer: peer, renewAt: RenewAt(now, peer.NotAfter)}
	for _, der := range r.GetX509Svid() {
		made.Chain = append(made.Chain, der...)
	}
	return made, nil
}

func (c *Cache) checkRevoked(made *SVID) error {
	if r, revoked := c.revocations.Load().Concerning(made.Peer); revoked {
		return fmt.Errorf("the CA signed an SVID that is revoked already: %s", r.Note)
	}
	return nil
}

// RenewAt is when to renew what was issued now and ends at notAfter: at half
// of its life ± 10 %, so that those who started together drift apart. NotBefore
// does not count: it is backdated, and with a short life half of that would be
// at once. The answer is a time of the wall clock alone.
func RenewAt(now, notAfter time.Time) time.Time {
	half := float64(notAfter.Sub(now)) / 2
	return now.Add(time.Duration(half * (0.9 + 0.2*mathrand.Float64()))).Round(0) //nolint:gosec // jitter
}

func (c *Cache) settleAll(ctx context.Context, batch []want, err error) {
	for _, w := range batch {
		c.settle(ctx, w, nil, err)
	}
}

// settle puts a result in its slot, unless the slot is not what it was.
func (c *Cache) settle(ctx context.Context, w want, made *SVID, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sl := w.slot
	sl.ordered = false
	if c.slots[sl.key] != sl || c.closed {
		return
	}
	if made != nil {
		// Under the lock: a revocation that came while the SVID was on its way
		// found nothing in the slot to drop.
		err = c.checkRevoked(made)
	}
	switch {
	case sl.outdated:
		sl.outdated = false
	case err != nil:
		if w.returns != c.returns { // it may have failed for want of the CA that is back
			sl.failures = 0
		}
		c.failed(ctx, sl, err)
	default:
		c.metrics.issued.WithLabelValues("ok").Inc()
		if made.Entry != sl.entry { // its hint changed meanwhile
			made.Entry = sl.entry
		}
		sl.svid, sl.reissue, sl.failures, sl.nextTry, sl.refusal = c.hurry(made), false, 0, time.Time{}, ""
		c.log.LogAttrs(ctx, slog.LevelInfo, "SVID issued",
			slog.String("spiffe_id", made.Peer.ID.String()), slog.String("entry_id", made.Entry.ID),
			slog.String("serial", made.Peer.SerialHex), slog.Time("not_after", made.Peer.NotAfter))
		sl.notifyUsers()
		signal(c.served) // it may have been the last tainted one
		signal(c.changed)
	}
	c.turn(sl)
}

// toldToWait is how long the CA asks to be left alone, as it does with an agent that
// has had its share of SVIDs; 0: it says nothing of that.
func toldToWait(err error) time.Duration {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok {
			return info.GetRetryDelay().AsDuration()
		}
	}
	return 0
}

// failed plans the next try. c.mu is held.
func (c *Cache) failed(ctx context.Context, sl *slot, err error) {
	c.metrics.issued.WithLabelValues("error").Inc()
	level := slog.LevelWarn
	if sl.failures > 0 {
		level = slog.LevelDebug // said already
	}
	wait := min(max(firstRetry<<min(sl.failures, 10), toldToWait(err)), lastRetry)
	wait = wait/2 + time.Duration(mathrand.Int64N(int64(wait))) //nolint:gosec // jitter
	sl.failures++
	sl.nextTry = time.Now().Add(wait)
	sl.refusal = refusalFor(err)
	c.log.LogAttrs(ctx, level, "SVID not issued",
		slog.String("spiffe_id", sl.entry.SPIFFEID.String()), slog.String("entry_id", sl.entry.ID),
		slog.Duration("retry_in", wait), slog.Any("err", err))
	if sl.failures == 1 {
		sl.notifyUsers()
	}
}
