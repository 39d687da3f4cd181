// X509-SVIDs for keys that never leave the workload. What it may have is decided
// where the Workload API asks, too; here it is asked for CSRs, and its process is
// looked at again before each of them and before each answer.

package local

import (
	"context"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
)

// holder is one HoldKeys stream.
type holder struct {
	*Server
	*caller
	stream grpc.BidiStreamingServer[agentpb.HoldKeysRequest, agentpb.HoldKeysResponse]
	last   proto.Message
}

// How many CSRs of one user go to the CA: at once after a rest, and then each
// second. On one stream no more are wanted than are due; but each new stream wants
// its own.
const (
	csrsBurst     = 1000
	csrsPerSecond = 100
)

// HoldKeys implements agentpb.Local.
func (s *Server) HoldKeys(stream grpc.BidiStreamingServer[agentpb.HoldKeysRequest, agentpb.HoldKeysResponse]) error {
	h := &holder{Server: s, caller: s.follow(), stream: stream}
	defer h.sub.Close()
	ctx := stream.Context()
	requests := make(chan *agentpb.HoldKeysRequest)
	go h.receive(ctx, requests) // ends with the stream
	for {
		if err := h.answer(ctx); err != nil {
			return err
		}
		select {
		case <-h.sub.Woken():
		case req, ok := <-requests:
			if !ok {
				return nil
			}
			if err := h.submit(ctx, req); err != nil {
				return err
			}
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// receive takes one request at a time: the next waits in the caller's own window.
func (h *holder) receive(ctx context.Context, requests chan<- *agentpb.HoldKeysRequest) {
	defer close(requests)
	for {
		req, err := h.stream.Recv()
		if err != nil {
			return
		}
		select {
		case requests <- req:
		case <-ctx.Done():
			return
		}
	}
}

// answer says what the caller may have, if that came out differently.
func (h *holder) answer(ctx context.Context) error {
	p, err := h.attest(ctx)
	if err != nil {
		return err
	}
	view, keys := h.sub.OwnKeys(p.Proof())
	m := heldIdentities(keys)
	switch {
	case len(keys) == 0 && view.Current:
		return endpoint.NoEntry(p.PID)
	case m.onlyByAgent && view.Current:
		return endpoint.KeysByAgent()
	case len(keys) == 0 || m.onlyByAgent || view.Trust == nil:
		return nil // nothing certain to say
	}
	m.Bundles = map[string][]byte{view.Trust.Bundle.TrustDomain().IDString(): view.Trust.X509}
	for _, f := range view.Federated {
		if len(f.X509) > 0 {
			m.Bundles[f.TrustDomain.IDString()] = f.X509
		}
	}
	if h.last == nil || !proto.Equal(m.HoldKeysResponse, h.last) {
		if err := h.o.Callers.Alive(ctx); err != nil {
			return err
		}
		if err := endpoint.Deliver(ctx, endpoint.Patience, func() error { return h.stream.Send(m.HoldKeysResponse) }); err != nil {
			return err
		}
		h.last = m.HoldKeysResponse
	}
	h.sub.Delivered(view.Trust.Sequence)
	return nil
}

type answer struct {
	*agentpb.HoldKeysResponse
	onlyByAgent bool
}

func heldIdentities(keys []cache.OwnKey) answer {
	m := answer{&agentpb.HoldKeysResponse{}, true}
	for _, k := range keys {
		held := &agentpb.HeldIdentity{
			SpiffeId: k.Entry.SPIFFEID.String(), Hint: k.Entry.Hint, ByAgent: !k.Entry.OwnKey, CsrWanted: k.Wanted, Refusal: k.Refusal,
		}
		if k.SVID != nil {
			held.X509Svid = k.SVID.Chain
		}
		m.onlyByAgent = m.onlyByAgent && held.GetByAgent()
		m.Identities = append(m.Identities, held)
	}
	return m
}

// submit sends a CSR on to the CA. The process may have changed since the last
// answer, and with it what it may have.
func (h *holder) submit(ctx context.Context, req *agentpb.HoldKeysRequest) error {
	p, err := h.attest(ctx)
	if err != nil {
		return err
	}
	h.sub.OwnKeys(p.Proof())
	if err := h.csrs.Admit(ctx, "CSRs", "keep the stream open, and answer each wish once"); err != nil {
		return err
	}
	public, err := cache.CSRKey(req.GetCsr())
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	id, err := spiffeid.FromString(req.GetSpiffeId())
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
	}
	switch err := h.sub.Submit(id, req.GetCsr(), public); {
	case errors.Is(err, cache.ErrNotOwn):
		return h.o.Callers.NotAmong(err.Error())
	case err != nil:
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	return nil
}
