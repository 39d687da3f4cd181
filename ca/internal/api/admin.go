// Admin: registration entries, tokens, agents and the trust bundle.

package api

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

const maxPageSize = 1000

// The lives of tokens.
const (
	defaultJoinTTL   = 10 * time.Minute
	maxJoinTTL       = 24 * time.Hour
	defaultReaderTTL = 90 * 24 * time.Hour
	maxReaderTTL     = 366 * 24 * time.Hour
)

// CreateEntry implements capb.AdminServer.
func (s *Service) CreateEntry(ctx context.Context, req *capb.CreateEntryRequest) (*capb.CreateEntryResponse, error) {
	e, err := s.newEntry(ctx, req.GetEntry())
	if err != nil {
		return nil, err
	}
	value, err := entry.Encode(e)
	if err != nil {
		return nil, err
	}
	key := registry.EntryPrefix + e.ID
	granted, ends, err := approval.Join(ctx, "")
	if err != nil {
		return nil, err
	}
	res, err := s.opts.Store.Txn(ctx, append(granted, store.Cmp{Key: key}), append(ends, store.Put(key, value)), nil)
	if err != nil {
		return nil, fmt.Errorf("store a registration entry: %w", err)
	}
	if !res.Succeeded && len(granted) > 0 {
		return nil, approval.ErrEnded
	}
	if !res.Succeeded {
		return nil, errors.New("store a registration entry: the random generator repeats itself")
	}
	e.Revision = res.Revision
	if err := s.done(ctx, audit.Record{Detail: "create entry", EntryID: e.ID, SPIFFEID: e.SPIFFEID.String()}); err != nil {
		return nil, err
	}
	if err := s.registry.Wait(ctx, res.Revision); err != nil {
		return nil, err
	}
	return &capb.CreateEntryResponse{Entry: s.entryForAdmin(e)}, nil
}

// newEntry is the entry that the caller asks for, if it may be made.
func (s *Service) newEntry(ctx context.Context, asked *capb.Entry) (*entry.Entry, error) {
	e, err := entryFromProto(asked)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	if err := e.Validate(s.opts.TrustDomain, now); err != nil {
		return nil, err
	}
	if err := s.mayRegister(callerFrom(ctx), e); err != nil {
		return nil, err
	}
	if err := s.checkAgreement(e, now); err != nil {
		return nil, err
	}
	e.ID, e.CreatedAt = entry.NewID(), now
	return e, nil
}

// checkAgreement refuses an entry that would take its SPIFFE ID the role that
// other entries give it, or that would give one in vain: see Registry.Role. Two
// that come at the same moment can still disagree; then there is no role.
func (s *Service) checkAgreement(e *entry.Entry, now time.Time) error {
	other, ok := s.registry.Disagrees(e, now)
	if !ok {
		return nil
	}
	return &entry.InvalidError{Field: "role", Reason: fmt.Sprintf("is %s, and entry %s gives %s the role %s: all entries of one SPIFFE ID give the same, or it has none",
		said(e.Role), other.ID, e.SPIFFEID, said(other.Role))}
}

func said(r role.Role) string {
	if r.Name == "" {
		return "none"
	}
	return r.String()
}

// refuseAdmin records that an administrator's request was not carried out.
func (s *Service) refuseAdmin(ctx context.Context, about audit.Record, err error) error {
	return s.refuse(ctx, callerFrom(ctx), about, s.toStatus(ctx, err))
}

// ListEntries implements capb.AdminServer. The page token is the last ID.
func (s *Service) ListEntries(ctx context.Context, req *capb.ListEntriesRequest) (*capb.ListEntriesResponse, error) {
	size := int(req.GetPageSize())
	if size < 0 || size > maxPageSize {
		return nil, &entry.InvalidError{Field: "page_size", Reason: fmt.Sprintf("%d is not between 0 and %d", size, maxPageSize)}
	}
	if size == 0 {
		size = maxPageSize
	}
	if t := req.GetPageToken(); t != "" && !entry.ValidID(t) {
		return nil, &entry.InvalidError{Field: "page_token", Reason: "was not given out by this CA"}
	}
	filter := registry.Filter{ParentID: req.GetParentId(), SPIFFEID: req.GetSpiffeId()}
	if c := callerFrom(ctx); !c.everywhere() {
		filter.Only = func(e *entry.Entry) bool { return c.covers(e.SPIFFEID) }
	}
	page, more := s.registry.Entries(filter, req.GetPageToken(), size)
	resp := &capb.ListEntriesResponse{}
	for _, e := range page {
		resp.Entries = append(resp.Entries, s.entryForAdmin(e))
	}
	if more {
		resp.NextPageToken = page[len(page)-1].ID
	}
	return resp, nil
}

// GetEntry implements capb.AdminServer.
func (s *Service) GetEntry(ctx context.Context, req *capb.GetEntryRequest) (*capb.GetEntryResponse, error) {
	e, ok := s.registry.Entry(req.GetEntryId())
	if !ok {
		return nil, registry.ErrNoEntry
	}
	if !callerFrom(ctx).covers(e.SPIFFEID) {
		return nil, s.refuseAdmin(ctx, audit.Record{Detail: "get entry", EntryID: e.ID, SPIFFEID: e.SPIFFEID.String()}, registry.ErrNoEntry)
	}
	return &capb.GetEntryResponse{Entry: s.entryForAdmin(e)}, nil
}

// CreateToken implements capb.AdminServer.
func (s *Service) CreateToken(ctx context.Context, req *capb.CreateTokenRequest) (*capb.CreateTokenResponse, error) {
	switch req.GetKind() {
	case capb.TokenKind_TOKEN_KIND_JOIN:
		return s.createJoinToken(ctx, req)
	case capb.TokenKind_TOKEN_KIND_BUNDLE_READER:
		return s.createReaderToken(ctx, req)
	case capb.TokenKind_TOKEN_KIND_REPLICA, capb.TokenKind_TOKEN_KIND_NESTED_CA:
		return s.createReplicaToken(ctx, req)
	default:
		return nil, &entry.InvalidError{Field: "kind", Reason: "is missing"}
	}
}

func (s *Service) createJoinToken(ctx context.Context, req *capb.CreateTokenRequest) (*capb.CreateTokenResponse, error) {
	name := req.GetAgentName()
	if name == "" {
		name = randomName()
	}
	id, err := entry.AgentID(s.opts.TrustDomain, name)
	if err != nil {
		return nil, err
	}
	if a, ok := s.registry.Agent(id); ok && a.Standing == attest.Banned {
		return nil, &attest.StandingError{ID: id.String(), Reason: "is banned: no token lets it in (merlon agent unban)"}
	}
	expires, err := tokenExpiry(req.GetTtlSeconds(), defaultJoinTTL, maxJoinTTL)
	if err != nil {
		return nil, err
	}
	token, err := attest.CreateJoinToken(ctx, s.opts.Store, name, expires)
	if err != nil {
		return nil, err
	}
	if err := s.done(ctx, audit.Record{Detail: "create join token", SPIFFEID: id.String(), NotAfter: expires}); err != nil {
		return nil, err
	}
	return &capb.CreateTokenResponse{
		Token: token, AgentId: id.String(), ExpiresAt: timestamp(expires), RootHash: svid.KeyHash(s.opts.Keys.X509().Root),
	}, nil
}

func (s *Service) createReaderToken(ctx context.Context, req *capb.CreateTokenRequest) (*capb.CreateTokenResponse, error) {
	name := req.GetPolicyBundle()
	if name == "" {
		name = release.DefaultName
	}
	if err := release.CheckName(name); err != nil {
		return nil, err
	}
	expires, err := tokenExpiry(req.GetTtlSeconds(), defaultReaderTTL, maxReaderTTL)
	if err != nil {
		return nil, err
	}
	token, err := attest.CreateReaderToken(ctx, s.opts.Store, name, expires)
	if err != nil {
		return nil, err
	}
	if err := s.done(ctx, audit.Record{Detail: "create bundle-reader token for " + name, NotAfter: expires}); err != nil {
		return nil, err
	}
	return &capb.CreateTokenResponse{Token: token, ExpiresAt: timestamp(expires)}, nil
}

func tokenExpiry(seconds int64, def, longest time.Duration) (time.Time, error) {
	if seconds < 0 || seconds > int64(longest/time.Second) {
		return time.Time{}, &entry.InvalidError{Field: "ttl_seconds", Reason: fmt.Sprintf("%d is not between 0 and %d", seconds, int64(longest/time.Second))}
	}
	ttl := time.Duration(seconds) * time.Second
	if ttl == 0 {
		ttl = def
	}
	return time.Now().Add(ttl), nil
}

func randomName() string {
	var b [6]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	return "node-" + hex.EncodeToString(b[:])
}

// GetTrustBundle implements capb.AdminServer.
func (s *Service) GetTrustBundle(context.Context, *capb.GetTrustBundleRequest) (*capb.GetTrustBundleResponse, error) {
	b := s.registry.Trust()
	if b == nil {
		return nil, status.Error(codes.Unavailable, "no trust bundle is published yet")
	}
	resp := &capb.GetTrustBundleResponse{TrustBundle: s.trustToProto(b)}
	for _, root := range b.Keys.X509Authorities() {
		resp.RootHashes = append(resp.RootHashes, svid.KeyHash(root))
	}
	return resp, nil
}
