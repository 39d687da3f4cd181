// Revocation: withdrawing SVIDs before they expire, alone or together with
// their registration entry.

package api

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

const (
	maxNoteBytes      = 1024
	maxAuthorityBytes = 128
	// recordLife outlives every SVID that exists when a record is made: none is
	// issued for longer than MaxSVIDTTL, whatever defaults were configured
	// then. Its end is the only date in it; what is added is for clocks that are off,
	// that of the replica which issued against that of the one which revokes.
	recordLife    = entry.MaxSVIDTTL + time.Hour + time.Minute
	maxTxnRetries = 16
)

// DeleteEntry implements capb.AdminServer. In one transaction the entry goes
// and what was issued for its SPIFFE ID is revoked: nobody ever sees the one
// without the other.
func (s *Service) DeleteEntry(ctx context.Context, req *capb.DeleteEntryRequest) (*capb.DeleteEntryResponse, error) {
	if !entry.ValidID(req.GetEntryId()) {
		return nil, registry.ErrNoEntry
	}
	for range maxTxnRetries {
		e, rec, err := s.tryDelete(ctx, registry.EntryPrefix+req.GetEntryId())
		if err != nil && e != nil { // it is there, and not for this caller
			return nil, s.refuseAdmin(ctx, audit.Record{Detail: "delete entry", EntryID: e.ID, SPIFFEID: e.SPIFFEID.String()}, err)
		}
		if err != nil {
			return nil, err
		}
		if rec == nil {
			continue // it changed under us
		}
		if err := s.done(ctx, audit.Record{Detail: "delete entry", EntryID: e.ID, SPIFFEID: e.SPIFFEID.String()}); err != nil {
			return nil, err
		}
		if err := s.registry.Wait(ctx, rec.Revision); err != nil {
			return nil, err
		}
		return &capb.DeleteEntryResponse{Entry: entryToProto(e), Revocation: revocationToProto(rec)}, nil
	}
	return nil, errors.New("delete a registration entry: others keep changing it")
}

// tryDelete returns no record when the entry changed meanwhile.
func (s *Service) tryDelete(ctx context.Context, key string) (*entry.Entry, *revocation.Record, error) {
	kv, _, err := s.opts.Store.Get(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil, registry.ErrNoEntry
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read a registration entry: %w", err)
	}
	e, err := entry.Decode(kv.Value)
	if err != nil {
		return nil, nil, err
	}
	e.Revision = kv.ModRevision
	if err := s.mayDelete(callerFrom(ctx), e); err != nil {
		return e, nil, err
	}
	r := svid.Revocation{SPIFFEID: e.SPIFFEID.String(), ExpiresAt: time.Now().Add(recordLife), Note: "registration entry " + e.ID + " deleted"}
	put, recKey, err := revocation.Put(s.opts.Realm, r)
	if err != nil {
		return nil, nil, err
	}
	res, err := s.opts.Store.Txn(ctx, []store.Cmp{{Key: key, ModRevision: kv.ModRevision}}, []store.Op{store.Delete(key), put}, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("delete a registration entry: %w", err)
	}
	if !res.Succeeded {
		return e, nil, nil
	}
	return e, s.revocationAt(r, recKey, res.Revision), nil
}

// Revoke implements capb.AdminServer.
func (s *Service) Revoke(ctx context.Context, req *capb.RevokeRequest) (*capb.RevokeResponse, error) {
	r, err := s.revocationOf(req)
	if err == nil {
		err = s.mayRevoke(callerFrom(ctx), r)
	}
	if err != nil {
		return nil, err
	}
	put, key, err := revocation.Put(s.opts.Realm, r)
	if err != nil {
		return nil, err
	}
	granted, ends, err := approval.Join(ctx, "")
	if err != nil {
		return nil, err
	}
	res, err := s.opts.Store.Txn(ctx, granted, append(ends, put), nil)
	if err != nil {
		return nil, fmt.Errorf("store a revocation: %w", err)
	}
	if !res.Succeeded {
		return nil, approval.ErrEnded
	}
	if err := s.done(ctx, audit.Record{Detail: "revoke " + subjectOf(r), Reason: r.Note, SPIFFEID: r.SPIFFEID + r.AgentID, Serial: r.Serial}); err != nil {
		return nil, err
	}
	if err := s.registry.Wait(ctx, res.Revision); err != nil {
		return nil, err
	}
	return &capb.RevokeResponse{Revocation: revocationToProto(s.revocationAt(r, key, res.Revision)), NotTold: s.notTold(time.Now())}, nil
}

func subjectOf(r svid.Revocation) string {
	switch {
	case r.SPIFFEID != "":
		return "SPIFFE ID"
	case r.AgentID != "":
		return "agent"
	case r.AuthorityID != "":
		return "authority " + r.AuthorityID
	default:
		return "serial"
	}
}

// revocationOf checks a request.
func (s *Service) revocationOf(req *capb.RevokeRequest) (svid.Revocation, error) {
	r := svid.Revocation{ExpiresAt: time.Now().Add(recordLife), Note: req.GetNote()}
	if err := checkNote(r.Note); err != nil {
		return r, err
	}
	switch subject := req.GetSubject().(type) {
	case *capb.RevokeRequest_SpiffeId:
		id, err := s.ownID("spiffe_id", subject.SpiffeId)
		r.SPIFFEID = id.String()
		return r, err
	case *capb.RevokeRequest_AgentId:
		return s.agentRevocation(r, subject.AgentId)
	case *capb.RevokeRequest_AuthorityId:
		r.AuthorityID = subject.AuthorityId
		return r, checkAuthorityID(subject.AuthorityId)
	case *capb.RevokeRequest_Serial:
		r.Serial = subject.Serial
		if err := r.Validate(); err != nil || r.Serial == "" {
			return r, &entry.InvalidError{Field: "serial", Reason: fmt.Sprintf("%q is not a serial number in lower-case hex", subject.Serial)}
		}
		return r, nil
	default:
		return r, &entry.InvalidError{Field: "subject", Reason: "is missing"}
	}
}

func checkNote(note string) error {
	if len(note) > maxNoteBytes || strings.ContainsFunc(note, func(c rune) bool { return !unicode.IsPrint(c) }) {
		return &entry.InvalidError{Field: "note", Reason: fmt.Sprintf("want up to %d bytes of printable text", maxNoteBytes)}
	}
	return nil
}

// fitNote makes a note of text that checkNote passes.
func fitNote(text string) string {
	text = strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return ' '
		}
		return c
	}, text)
	end := min(len(text), maxNoteBytes)
	for end < len(text) && !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end]
}

func (s *Service) agentRevocation(r svid.Revocation, text string) (svid.Revocation, error) {
	id, err := s.ownID("agent_id", text)
	if err != nil {
		return r, err
	}
	agent, ok := s.registry.Agent(id)
	if !ok {
		return r, attest.ErrUnknownAgent
	}
	r.AgentID, r.AgentHandle = id.String(), agent.Handle
	return r, nil
}

// ownID parses the ID of something in the own trust domain that can have an
// SVID.
func (s *Service) ownID(field, text string) (spiffeid.ID, error) {
	id, err := entry.ParseID(field, text)
	if err != nil {
		return id, err
	}
	if !id.MemberOf(s.opts.TrustDomain) || id.Path() == "" {
		return id, &entry.InvalidError{Field: field, Reason: fmt.Sprintf("%s is nobody in the trust domain %s", id, s.opts.TrustDomain)}
	}
	return id, nil
}

func checkAuthorityID(id string) error {
	b, err := hex.DecodeString(id)
	if err != nil || len(b) == 0 || len(id) > maxAuthorityBytes || strings.ToLower(id) != id {
		return &entry.InvalidError{Field: "authority_id", Reason: "want the subject key ID of an authority in lower-case hex"}
	}
	return nil
}

// ListRevocations implements capb.AdminServer.
func (s *Service) ListRevocations(ctx context.Context, _ *capb.ListRevocationsRequest) (*capb.ListRevocationsResponse, error) {
	resp := &capb.ListRevocationsResponse{}
	c := callerFrom(ctx)
	for _, r := range s.registry.Revocations(time.Now()) {
		if !c.sees(r) {
			continue
		}
		resp.Revocations = append(resp.Revocations, revocationToProto(r))
	}
	return resp, nil
}
