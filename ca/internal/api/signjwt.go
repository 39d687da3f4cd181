// JWT-SVIDs for agents, some at a time: what a call costs beside the signatures
// (headers, one sync of the audit log, an answer) is then paid once for all.

package api

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/sdk/checkpoint"
)

const (
	// maxJWTItems bounds the work of one call, and its answer: 1.6 MiB with tokens
	// as long as validators read.
	maxJWTItems      = 100
	maxAudienceBytes = 1024
)

// SignJWT implements capb.NodeServer.
func (s *Service) SignJWT(ctx context.Context, req *capb.SignJWTRequest) (*capb.SignJWTResponse, error) {
	caller := callerFrom(ctx)
	if n := len(req.GetItems()); n == 0 || n > maxJWTItems {
		return nil, s.refuse(ctx, caller, audit.Record{Detail: "sign JWT"}, status.Errorf(codes.InvalidArgument, "items: %d given; 1 to %d", n, maxJWTItems))
	}
	ids := make([]string, len(req.GetItems()))
	for i, item := range req.GetItems() {
		ids[i] = item.GetEntryId()
	}
	key := s.opts.Keys.JWT()
	if err := s.jwtFault(key.KeyID); err != nil {
		return nil, err
	}
	g, err := s.grounds(ctx, caller, "sign JWT", ids...)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	if err := s.affords(ctx, caller, &g, len(ids), "sign JWT", now); err != nil {
		return nil, err
	}
	batch := signingJWT{service: s, caller: caller, grounds: g, key: key, now: now}
	resp := &capb.SignJWTResponse{Results: make([]*capb.SignJWTResult, len(ids))}
	for i, item := range req.GetItems() {
		resp.Results[i] = batch.sign(ctx, item, g.Entries[i])
	}
	// No token leaves before all records are on disk, unless the log is async.
	if err := s.issued(ctx, batch.records...); err != nil {
		return nil, fmt.Errorf("record %d JWT-SVIDs: %w", len(batch.records), err)
	}
	return resp, nil
}

// signingJWT is one SignJWT call: everything in it rests on one picture, and is
// signed with one key.
type signingJWT struct {
	service *Service
	caller  *Caller
	grounds registry.Grounds
	key     *authority.JWTAuthority
	now     time.Time
	records []audit.Record
}

func (b *signingJWT) sign(ctx context.Context, item *capb.SignJWTItem, e *entry.Entry) *capb.SignJWTResult {
	r := issueRecord(b.now, b.caller, item.GetEntryId(), e)
	token, err := b.issue(item, e, &r)
	if err != nil {
		st := status.Convert(b.service.toStatus(ctx, err))
		r.Type, r.Detail, r.Reason = audit.Refuse, "sign JWT", st.Message()
		if b.service.writesDown(b.caller) {
			b.records = append(b.records, r)
		}
		b.service.metrics.issued.WithLabelValues("jwt", "refused").Inc()
		return &capb.SignJWTResult{Code: int32(st.Code()), Message: st.Message()}
	}
	b.records = append(b.records, r)
	b.service.metrics.issued.WithLabelValues("jwt", "ok").Inc()
	return &capb.SignJWTResult{Token: token}
}

// issue signs one token, and completes its record.
func (b *signingJWT) issue(item *capb.SignJWTItem, e *entry.Entry, r *audit.Record) (token string, err error) {
	if err := mayIssue(e, &b.grounds, b.now); err != nil {
		return "", err
	}
	if err := b.checkAudience(item.GetAudience()); err != nil {
		return "", err
	}
	serial, err := b.service.number(b.grounds.Agent.Handle, b.grounds.Revision)
	if err != nil {
		return "", err
	}
	token, notAfter, err := b.key.Issue(authority.JWTRequest{
		SPIFFEID: e.SPIFFEID, Issuer: b.service.opts.JWTIssuer, Audience: item.GetAudience(), Serial: serial, TTL: e.JWTTTL(b.now, b.service.opts.JWTSVIDTTL), Now: b.now,
	})
	if err != nil {
		return "", err
	}
	signed, err := checkpoint.TokenHash(token)
	if err != nil {
		return "", err
	}
	r.Serial, r.NotAfter, r.AuthorityID, r.SignedHash, r.Detail = serial.String(), notAfter, b.key.KeyID, signed, "JWT"
	return token, nil
}

func (b *signingJWT) checkAudience(audience []string) error {
	if n, most := len(audience), b.service.opts.JWTMaxAudiences; n > most {
		return &entry.InvalidError{Field: "audience", Reason: fmt.Sprintf("%d given; the CA signs for %d at most (jwt_max_audiences): ask for a token each", n, most)}
	}
	for _, aud := range audience {
		if len(aud) > maxAudienceBytes {
			return &entry.InvalidError{Field: "audience", Reason: fmt.Sprintf("one has %d bytes; at most %d", len(aud), maxAudienceBytes)}
		}
	}
	return nil
}
