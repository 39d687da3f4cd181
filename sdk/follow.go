// What the agent streams: X509-SVIDs with trust bundles by the SPIFFE Workload
// API, revocations and the active policy by Merlon's local API. Every message
// is complete: what is no longer in it is withdrawn (SPIFFE Workload API,
// section 4).

package sdk

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/sdk/svid"
)

// silence is how long the revocation feed may say nothing, three times what
// the agent promises, before the stream counts as broken.
const silence = 45 * time.Second

// keepRevocations is how long revocations are kept after the last X509-SVID has ended
// that they can concern: by a clock which was ahead from the start, and will be set right,
// that may be still to come.
const keepRevocations = 24 * time.Hour

// pruneEvery is how often they are looked through for such.
const pruneEvery = time.Minute

// errBadAnswer marks messages of the agent that are discarded.
var errBadAnswer = errors.New("the agent's answer is malformed")

// followSVIDs is one stream of X509-SVIDs: for keys of this process where its
// registration entry lets it hold them, and else with keys that the agent makes.
func (id *Identity) followSVIDs(ctx context.Context, progress func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := id.holdKeys(ctx, progress); !errors.Is(err, errKeysByAgent) {
		return err
	}
	stream, err := id.agent.workload.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return err
	}
	for {
		res, err := stream.Recv()
		if status.Code(err) == codes.PermissionDenied && !keysByWorkload(err) {
			id.withdraw(ctx, err)
		}
		if err != nil {
			return err
		}
		if err := id.take(ctx, res); err != nil {
			return err
		}
		progress()
	}
}

// take makes what a message says current.
func (id *Identity) take(ctx context.Context, res *workload.X509SVIDResponse) error {
	next, err := parseSVIDs(res, time.Now())
	if err != nil {
		return fmt.Errorf("%w: %w", errBadAnswer, err)
	}
	id.adopt(ctx, next)
	if next.svid == nil {
		return fmt.Errorf("%w: %w", errBadAnswer, next.err)
	}
	return nil
}

// parseSVIDs reads a message strictly. The first SVID is the identity (SPIFFE
// Workload API, section 8). A message without mandatory parts is discarded
// (section 4.5). The trust bundles of any other message count, even when the
// own SVID does not verify against them: to keep the old ones would be to
// trust what was withdrawn.
func parseSVIDs(res *workload.X509SVIDResponse, now time.Time) (*current, error) {
	if len(res.GetSvids()) == 0 {
		return nil, errors.New("it has no X509-SVID")
	}
	first := res.GetSvids()[0]
	want, err := spiffeid.FromString(first.GetSpiffeId())
	if err != nil {
		return nil, fmt.Errorf("SPIFFE ID: %w", err)
	}
	own, err := x509svid.ParseRaw(first.GetX509Svid(), first.GetX509SvidKey())
	if err != nil {
		return nil, fmt.Errorf("X509-SVID of %s: %w", want, err)
	}
	if own.ID != want {
		return nil, fmt.Errorf("the X509-SVID is of %s and the message says %s", own.ID, want)
	}
	next := &current{svid: own, roots: make(map[spiffeid.TrustDomain]map[string]bool)}
	if err := next.setBundles(want.TrustDomain(), first.GetBundle(), res.GetFederatedBundles()); err != nil {
		return nil, err
	}
	// An identity that others would refuse is none. Whether it has begun and not ended is
	// looked at each time it is shown: clocks that are set right make it good by itself.
	var end time.Time
	next.notBefore, end = validity(own.Certificates)
	at := now
	switch {
	case now.Before(next.notBefore):
		at = next.notBefore
	case now.After(end):
		at = end
	}
	self, err := svid.VerifyChain(own.Certificates, next.bundles, at)
	if err != nil {
		next.svid, next.err = nil, fmt.Errorf("the own X509-SVID of %s: %w", want, err)
		return next, nil
	}
	next.notAfter, next.authorities = self.NotAfter, self.AuthorityIDs
	return next, nil
}

// validity is when all certificates of a chain are valid.
func validity(chain []*x509.Certificate) (notBefore, notAfter time.Time) {
	notAfter = chain[0].NotAfter
	for _, cert := range chain {
		if cert.NotBefore.After(notBefore) {
			notBefore = cert.NotBefore
		}
		if cert.NotAfter.Before(notAfter) {
			notAfter = cert.NotAfter
		}
	}
	return notBefore, notAfter
}

// setBundles takes the trust bundles in. No federated bundle replaces the own
// one (SECURITY.md T22); a malformed federated bundle means that its trust
// domain is not trusted.
func (c *current) setBundles(td spiffeid.TrustDomain, own []byte, federated map[string][]byte) error {
	bundle := x509bundle.New(td)
	if len(own) > 0 { // none: nothing is trusted (SPIFFE Trust Domain and Bundle, section 4.1.3)
		parsed, err := x509bundle.ParseRaw(td, own)
		if err != nil {
			return fmt.Errorf("trust bundle of %s: %w", td.IDString(), err)
		}
		bundle = parsed
	}
	c.bundles = x509bundle.NewSet()
	for name, raw := range federated {
		foreign, err := spiffeid.TrustDomainFromString(name)
		if err == nil {
			var bundle *x509bundle.Bundle
			if bundle, err = x509bundle.ParseRaw(foreign, raw); err == nil {
				c.bundles.Add(bundle)
			}
		}
		if err != nil {
			c.ignored = errors.Join(c.ignored, fmt.Errorf("federated trust bundle %q: %w", name, err))
		}
	}
	c.bundles.Add(bundle)
	for _, bundle := range c.bundles.Bundles() {
		ids := make(map[string]bool)
		for _, root := range bundle.X509Authorities() {
			ids[hex.EncodeToString(root.SubjectKeyId)] = true
		}
		c.roots[bundle.TrustDomain()] = ids
	}
	return nil
}

// adopt makes next current, and cuts the connections whose ground it removes.
func (id *Identity) adopt(ctx context.Context, next *current) {
	last := id.current.Load()
	if last.trust.Same(next.bundles) {
		next.trust, next.changes = last.trust, last.changes // with the chains that it has verified
	} else {
		next.trust, next.changes = svid.NewTrust(next.bundles), last.changes+1
	}
	before := id.current.Swap(next)
	renamed := before.svid != nil && next.svid != nil && before.svid.ID != next.svid.ID
	id.conns.cutWhere(func(c *liveConn) string {
		switch {
		case renamed:
			return "the own SPIFFE ID has changed"
		case !next.trusts(c.peer):
			return "the authority is not trusted any more"
		}
		return ""
	})
	if next.ignored != nil {
		id.log.LogAttrs(ctx, slog.LevelError, "trust bundles ignored", slog.Any("err", next.ignored))
	}
	id.drainTainted()
	if next.svid == nil {
		return
	}
	if err := next.goodAt(time.Now()); err != nil {
		id.ready.fail(identityFeed, fmt.Errorf("%w: %w", errBadAnswer, err))
		id.log.LogAttrs(ctx, slog.LevelWarn, "X509-SVID is of no use by this machine's clock", slog.Any("err", err))
		return
	}
	defer id.ready.haveIdentity() // who waits for the first does not hear of it as a rotation
	if before.svid != nil && before.svid.Certificates[0].Equal(next.svid.Certificates[0]) {
		return
	}
	id.log.LogAttrs(ctx, slog.LevelInfo, "X509-SVID received",
		slog.String("spiffe_id", next.svid.ID.String()),
		slog.String("serial", next.svid.Certificates[0].SerialNumber.Text(16)),
		slog.Time("not_after", next.notAfter))
	id.callRotated()
}

// withdraw gives the identity up, as PermissionDenied demands (SPIFFE Workload
// API, section 5.2.1): no handshake, no connection goes on with it.
func (id *Identity) withdraw(ctx context.Context, err error) {
	had := id.current.Swap(&current{
		err:     fmt.Errorf("the agent gives this process no identity: %w", err),
		bundles: x509bundle.NewSet(),
		trust:   new(svid.Trust),
	})
	if had.svid == nil {
		return
	}
	n := id.conns.cutWhere(func(*liveConn) string { return "the own identity was withdrawn" })
	id.log.LogAttrs(ctx, slog.LevelWarn, "identity withdrawn",
		slog.String("spiffe_id", had.svid.ID.String()), slog.Int("connections_cut", n), slog.Any("err", err))
}

// followRevocations is one stream of revocations.
func (id *Identity) followRevocations(ctx context.Context, progress func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := id.agent.local.Watch(ctx, &agentpb.WatchRequest{})
	if err != nil {
		return err
	}
	watchdog := time.AfterFunc(silence, cancel)
	defer watchdog.Stop()
	for {
		res, err := stream.Recv()
		if err != nil {
			id.losePolicyNews(ctx, err)
			return err
		}
		watchdog.Reset(silence)
		id.notePolicy(ctx, res)
		id.denyAfter.Store(int64(res.GetDenyAfter().AsDuration()))
		now := time.Now()
		id.revocationsAsOf.Store(steadyAsOf(res.GetRevocationsAsOf().AsTime(), now)) // never: 0, which is stale
		id.denyPolicyAfter.Store(int64(res.GetDenyPolicyAfter().AsDuration()))
		id.news.hearAsOf(steadyAsOf(res.GetPolicyAsOf().AsTime(), now))
		id.revoke(ctx, res)
		id.noteTaint(res.GetTaintedAuthorityIds())
		progress()
	}
}

// notePolicy takes in which policy is in use. Calls under way are decided again when
// that is another.
func (id *Identity) notePolicy(ctx context.Context, res *agentpb.WatchResponse) {
	g := res.GetPolicyGeneration()
	id.candidate.Store(res.GetCandidateGeneration())
	if id.generation.Swap(g) != g && id.ready.isReady() {
		id.log.LogAttrs(ctx, slog.LevelInfo, "policy changed", slog.Uint64("policy_revision", g))
	}
	if id.news.hear(versionOf(res.GetPolicyVersion(), g), time.Now()) {
		id.calls.changed()
		time.AfterFunc(lag, id.calls.changed) // where no program comes
	}
}

// losePolicyNews takes in that the agent announces nothing any more.
func (id *Identity) losePolicyNews(ctx context.Context, err error) {
	if id.news.gone(time.Now()) {
		id.log.LogAttrs(ctx, slog.LevelWarn, "agent went before it sent the policy that it had announced; the last one decides until it is back",
			slog.Uint64("announced_revision", id.generation.Load()), slog.Any("err", err))
	}
}

// revoke takes a message in and cuts the connections that it concerns.
func (id *Identity) revoke(ctx context.Context, res *agentpb.WatchResponse) {
	records, unknown := id.recordsOf(ctx, res.GetRevocations())
	known := id.revocations.Load()
	// A complete list replaces what is known, but not one of an agent that has
	// not heard from the CA since its start: what it forgot is still revoked.
	if res.GetReset_() && res.GetRevocationsAsOf() != nil {
		known = nil
	}
	if len(records) > 0 || known == nil {
		known = known.With(records...)
	}
	if now := time.Now(); now.Sub(id.pruned) >= pruneEvery {
		known, id.pruned = known.Prune(svid.Earliest(begun, now).Add(-keepRevocations)), now
	}
	id.revocations.Store(known)
	id.ready.haveRevocations()
	if unknown || slices.ContainsFunc(records, func(r svid.Revocation) bool { return r.AuthorityID != "" }) {
		// Revocations are looked at after each chain, and before each answer that was
		// kept: this is for good measure, and for what only the agent understands.
		id.current.Load().trust.Forget()
		id.forgetAnswers()
	}
	if len(records) == 0 {
		return
	}
	// What was known before does not concern any connection: see enter.
	added := svid.NewRevocations(records)
	n := id.conns.cutWhere(func(c *liveConn) string {
		if _, ok := added.Concerning(c.peer); ok {
			return "the peer's X509-SVID is revoked"
		}
		return ""
	})
	if n > 0 {
		id.log.LogAttrs(ctx, slog.LevelWarn, "revoked peers cut off", slog.Int("connections_cut", n))
	}
}

// recordsOf reads records, and says whether there are such as are not understood.
func (id *Identity) recordsOf(ctx context.Context, pbs []*agentpb.Revocation) (records []svid.Revocation, unknown bool) {
	records = make([]svid.Revocation, 0, len(pbs))
	for _, pb := range pbs {
		rec := revocationOf(pb)
		if err := rec.Validate(); err != nil {
			id.log.LogAttrs(ctx, slog.LevelError, "revocation not understood", slog.Any("err", err))
			unknown = true
			continue
		}
		records = append(records, rec)
	}
	return records, unknown
}

func revocationOf(pb *agentpb.Revocation) svid.Revocation {
	rec := svid.Revocation{
		SPIFFEID:       pb.GetSpiffeId(),
		AgentID:        pb.GetAgentId(),
		AuthorityID:    pb.GetAuthorityId(),
		Serial:         pb.GetSerial(),
		AgentHandle:    pb.GetAgentHandle(),
		BeforeRevision: pb.GetBeforeRevision(),
		Realm:          pb.GetRealm(),
		Note:           pb.GetNote(),
	}
	if pb.GetExpiresAt() != nil {
		rec.ExpiresAt = pb.GetExpiresAt().AsTime()
	}
	return rec
}
