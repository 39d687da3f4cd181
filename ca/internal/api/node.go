// Node: issues SVIDs to agents and through them.

package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/checkpoint"
	"merlon.dev/sdk/svid"
)

const (
	// maxSignItems bounds the work of one call, and its answer: about 1 MiB.
	maxSignItems = 500
	// renewedTimeout is how long a renewal waits for the store: agents wait
	// for the renewal.
	renewedTimeout = 3 * time.Second
)

// Renew implements capb.NodeServer.
func (s *Service) Renew(ctx context.Context, req *capb.RenewRequest) (*capb.RenewResponse, error) {
	caller := callerFrom(ctx)
	key, err := authority.PublicKeyFromCSR(req.GetCsr(), caller.Agent.ID)
	if err != nil {
		return nil, s.refuse(ctx, caller, audit.Record{Detail: "renew"}, s.toStatus(ctx, err))
	}
	g, err := s.grounds(ctx, caller, "renew")
	if err != nil {
		return nil, err
	}
	if err := s.affordsOwn(ctx, caller, time.Now()); err != nil {
		return nil, err
	}
	ca := s.opts.Keys.X509()
	leaf, err := s.signAgent(ctx, ca, g.Agent, g.Revision, key, audit.Renew, func(leaf *authority.Leaf) error {
		return s.renewed(ctx, caller, issuedTo(leaf, key))
	})
	if err != nil {
		return nil, err
	}
	return &capb.RenewResponse{X509Svid: chainOf(ca, leaf), TrustBundle: s.trustToProto(s.registry.Trust())}, nil
}

// renewed notes the agent's newest SVID, by which rotation counts it. A store that
// takes no writes, or is away, does not stop the renewal: it is noted when that is
// over (NoteRenewals), and a revocation concerns whatever was issued from an older
// picture for as long as that can live (recordLife). A copy of an SVID that was
// replaced long ago does: then nobody knows which of two is the agent.
func (s *Service) renewed(ctx context.Context, caller *Caller, issued attest.SVID) error {
	if s.Stale() {
		s.unnoted.add(caller.Agent.ID, shown(caller.Peer), issued)
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, renewedTimeout)
	defer cancel()
	err := attest.Renewed(bounded, s.opts.Store, caller.Agent.ID, shown(caller.Peer), issued)
	away := errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil
	switch {
	case away || errors.Is(err, store.ErrReadOnly) || errors.Is(err, store.ErrUnavailable):
		s.unnoted.add(caller.Agent.ID, shown(caller.Peer), issued)
		s.log.LogAttrs(ctx, slog.LevelWarn, "renewal of an agent is not noted in the store yet",
			slog.String("spiffe_id", caller.Name), slog.Any("err", err))
		return nil
	case errors.Is(err, attest.ErrCloned):
		return s.cloned(ctx, caller)
	}
	return err
}

// issuedTo is an SVID that an agent gets for its key.
func issuedTo(leaf *authority.Leaf, key any) attest.SVID {
	issued := attest.SVID{Serial: leaf.Serial.String(), NotAfter: leaf.NotAfter}
	if id, err := authority.IdentifyKey(key); err == nil {
		issued.KeyID = id.String()
	}
	return issued
}

// shown is the SVID that an agent shows.
func shown(p *svid.Peer) attest.SVID { return attest.SVID{Serial: p.SerialHex, NotAfter: p.NotAfter} }

// signAgent issues an agent's own X509-SVID and records it, once note has.
func (s *Service) signAgent(ctx context.Context, ca *authority.X509Authority, agent *attest.Agent, revision uint64, key any, act audit.Type, note func(*authority.Leaf) error) (*authority.Leaf, error) {
	serial, err := s.number(agent.Handle, revision)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	keyID, err := s.claim(key, agent.ID, agent, s.opts.AgentSVIDTTL, now)
	if err != nil {
		return nil, s.refuse(ctx, callerFrom(ctx), audit.Record{Detail: string(act)}, s.toStatus(ctx, err))
	}
	leaf, err := ca.Issue(authority.LeafRequest{SPIFFEID: agent.ID, PublicKey: key, Serial: serial, TTL: s.opts.AgentSVIDTTL, Now: now})
	if err != nil {
		s.metrics.issued.WithLabelValues("agent", "refused").Inc()
		return nil, err
	}
	signed, err := checkpoint.CertificateHash(leaf.DER)
	if err != nil {
		return nil, err
	}
	if err := note(leaf); err != nil {
		return nil, err
	}
	if err := s.issued(ctx, audit.Record{
		Time: now, Type: act, Actor: callerFrom(ctx).Name, SPIFFEID: agent.ID.String(), Serial: serial.String(),
		AuthorityID: ca.ID(), SignedHash: signed, KeyID: keyID, Detail: agent.Attestation, NotAfter: leaf.NotAfter,
	}); err != nil {
		return nil, fmt.Errorf("record the SVID of %s: %w", agent.ID, err)
	}
	s.metrics.issued.WithLabelValues("agent", "ok").Inc()
	return leaf, nil
}

// number makes the serial number of an SVID that rests on revision of the store.
func (s *Service) number(agent, revision uint64) (svid.Serial, error) {
	serial, err := svid.NewSerial(agent, revision)
	return serial.In(s.opts.Realm), err
}

// grounds is the picture that an issuance for the calling agent rests on. The
// caller was checked when the call began; what counts is that picture.
func (s *Service) grounds(ctx context.Context, caller *Caller, what string, ids ...string) (registry.Grounds, error) {
	g := s.registry.Grounds(caller.Peer, ids...)
	if err := agentFault(g, caller.Peer); err != nil {
		return g, s.refuse(ctx, caller, audit.Record{Detail: what}, refused(codes.Unauthenticated, refusalOf(err), caller.Name+": "+err.Error()))
	}
	return g, nil
}

// Sign implements capb.NodeServer.
func (s *Service) Sign(ctx context.Context, req *capb.SignRequest) (*capb.SignResponse, error) {
	caller := callerFrom(ctx)
	if n := len(req.GetItems()); n == 0 || n > maxSignItems {
		return nil, s.refuse(ctx, caller, audit.Record{Detail: "sign"}, status.Errorf(codes.InvalidArgument, "items: %d given; 1 to %d", n, maxSignItems))
	}
	ids := make([]string, len(req.GetItems()))
	for i, item := range req.GetItems() {
		ids[i] = item.GetEntryId()
	}
	g, err := s.grounds(ctx, caller, "sign", ids...)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	if err := s.affords(ctx, caller, &g, len(ids), "sign", now); err != nil {
		return nil, err
	}
	ca := s.opts.Keys.X509()
	batch := signing{service: s, caller: caller, grounds: g, ca: ca, authorityID: ca.ID(), now: now}
	resp := &capb.SignResponse{Results: make([]*capb.SignResult, len(ids))}
	for i, item := range req.GetItems() {
		resp.Results[i] = batch.sign(ctx, item, g.Entries[i])
	}
	// No SVID leaves before all records are on disk, unless the log is async.
	if err := s.issued(ctx, batch.records...); err != nil {
		return nil, fmt.Errorf("record %d issuances: %w", len(batch.records), err)
	}
	return resp, nil
}

// signing is one Sign call: everything in it rests on one picture.
type signing struct {
	service *Service
	caller  *Caller
	grounds registry.Grounds
	ca      *authority.X509Authority
	// authorityID is ca's, in hex once for the whole batch.
	authorityID string
	now         time.Time
	records     []audit.Record
}

func (b *signing) sign(ctx context.Context, item *capb.SignItem, e *entry.Entry) *capb.SignResult {
	made, err := b.issue(item, e)
	r := issueRecord(b.now, b.caller, item.GetEntryId(), e)
	if err != nil {
		st := status.Convert(b.service.toStatus(ctx, err))
		r.Type, r.Detail, r.Reason = audit.Refuse, "sign", st.Message()
		if b.service.writesDown(b.caller) {
			b.records = append(b.records, r)
		}
		b.service.metrics.issued.WithLabelValues("x509", "refused").Inc()
		return &capb.SignResult{Code: int32(st.Code()), Message: st.Message()}
	}
	r.Serial, r.NotAfter, r.AuthorityID, r.SignedHash, r.KeyID = made.Serial.String(), made.NotAfter, b.authorityID, made.signed, made.keyID
	r.Detail = made.cut
	b.records = append(b.records, r)
	b.service.metrics.issued.WithLabelValues("x509", "ok").Inc()
	return &capb.SignResult{X509Svid: chainOf(b.ca, made.Leaf), Warning: made.cut}
}

// issuedLeaf is a leaf with what the record says of it.
type issuedLeaf struct {
	*authority.Leaf
	signed, keyID string
	cut           string // why it lives shorter than asked for
}

func (b *signing) issue(item *capb.SignItem, e *entry.Entry) (made issuedLeaf, err error) {
	if err := mayIssue(e, &b.grounds, b.now); err != nil {
		return made, err
	}
	key, err := authority.PublicKeyFromCSR(item.GetCsr(), e.SPIFFEID)
	if err != nil {
		return made, err
	}
	serial, err := b.service.number(b.grounds.Agent.Handle, b.grounds.Revision)
	if err != nil {
		return made, err
	}
	ttl, asked := e.X509TTL(b.now, b.service.opts.X509SVIDTTL), e.AskedX509TTL(b.service.opts.X509SVIDTTL)
	if made.keyID, err = b.service.claim(key, e.SPIFFEID, b.grounds.Agent, ttl, b.now); err != nil {
		return made, err
	}
	made.Leaf, err = b.ca.Issue(authority.LeafRequest{
		SPIFFEID: e.SPIFFEID, PublicKey: key, Serial: serial, TTL: ttl, DNSNames: e.DNSNames, CommonName: e.CommonName, Now: b.now,
	})
	if err != nil {
		return made, err
	}
	switch {
	case made.Cut:
		made.cut = fmt.Sprintf("cut at the end of the issuing authority: %s were asked for", asked)
	case ttl < asked:
		made.cut = fmt.Sprintf("cut at the end of the registration entry: %s were asked for", asked)
	}
	made.signed, err = checkpoint.CertificateHash(made.DER)
	return made, err
}

// issueRecord is what the record of an issuance for e, or of its refusal, begins
// with; entryID is what was asked for.
func issueRecord(now time.Time, caller *Caller, entryID string, e *entry.Entry) audit.Record {
	r := audit.Record{Time: now, Type: audit.Issue, Actor: caller.Name, EntryID: printable(entryID)}
	if e != nil {
		r.SPIFFEID = e.SPIFFEID.String()
	}
	return r
}

// mayIssue says whether the agent of g may obtain SVIDs for e. Another node's entry is
// refused in the words used for one that does not exist, so that an agent
// cannot find out what others hold (SECURITY.md T7).
func mayIssue(e *entry.Entry, g *registry.Grounds, now time.Time) error {
	switch {
	case !g.Concerns(e, now):
		return status.Error(codes.PermissionDenied, "no registration entry with this ID below the calling agent")
	case e.Expired(now):
		return status.Error(codes.PermissionDenied, "the registration entry has expired")
	}
	return nil
}

// chainOf is what a client presents: leaf, then intermediates.
func chainOf(ca *authority.X509Authority, leaf *authority.Leaf) [][]byte {
	chain := [][]byte{leaf.DER}
	for _, c := range ca.Chain {
		chain = append(chain, c.Raw)
	}
	return chain
}

// printable keeps what an agent made up out of the audit log when it is no
// entry ID at all.
func printable(id string) string {
	if entry.ValidID(id) {
		return id
	}
	return "(malformed)"
}
