package etcd

// What etcd's and gRPC's errors mean to the store's callers.

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/internal/store"
)

// fault sorts what can go wrong with a request.
type fault int

const (
	permanent  fault = iota // the answer; asking again does not help
	unknown                 // no answer: it may have been carried out
	notCarried              // refused before it was carried out: ask again
)

func faultOf(err error) fault {
	code := status.Code(err)
	if etcd, ok := errors.AsType[rpctypes.EtcdError](rpctypes.Error(err)); ok {
		code = etcd.Code()
	}
	switch {
	case isAny(err, rpctypes.ErrNoLeader, rpctypes.ErrTooManyRequests, errNotConnected):
		return notCarried
	case isAny(err, rpctypes.ErrNoSpace, rpctypes.ErrRequestTooLarge, rpctypes.ErrTooManyOps):
		return permanent
	case code == codes.Unavailable, code == codes.DeadlineExceeded, code == codes.Canceled,
		isAny(err, context.DeadlineExceeded, context.Canceled):
		return unknown
	}
	return permanent
}

// isAny also knows etcd's errors as gRPC brings them.
func isAny(err error, targets ...error) bool {
	etcd := rpctypes.Error(err)
	for _, target := range targets {
		if errors.Is(err, target) || errors.Is(etcd, target) {
			return true
		}
	}
	return false
}

// explain makes an error of the store out of one of etcd's; ctx is the
// caller's.
func explain(ctx context.Context, what string, err error) error {
	switch {
	case isAny(err, rpctypes.ErrCompacted, rpctypes.ErrFutureRev):
		return fmt.Errorf("%s: %w", what, store.ErrCompacted)
	case isAny(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("%s: %w: etcd has used up its quota; compact and defragment it or raise quota-backend-bytes, then: etcdctl alarm disarm", what, store.ErrReadOnly)
	case isAny(err, rpctypes.ErrCorrupt):
		return fmt.Errorf("%s: etcd says that a member's data is corrupt; replace that member (etcdctl alarm list): %v", what, err)
	case isAny(err, rpctypes.ErrRequestTooLarge, rpctypes.ErrTooManyOps):
		return fmt.Errorf("%s: %w: etcd must allow max-request-bytes 1572864 and max-txn-ops 128, its defaults: %v", what, store.ErrTooLarge, err)
	case isAny(err, rpctypes.ErrPermissionDenied, rpctypes.ErrUserEmpty, rpctypes.ErrInvalidAuthToken):
		return fmt.Errorf("%s: etcd does not let this client certificate in; grant its common name a role that reads and writes all keys that begin with the prefix without its last slash (/merlon: the store, and /merlon.epoch beside it): %v", what, err)
	case isAny(err, rpctypes.ErrLeaseNotFound):
		return fmt.Errorf("%s: %w", what, errLeaseGone)
	case status.Code(err) == codes.Unimplemented:
		return fmt.Errorf("%s: etcd is older than version 3.7; upgrade it: %v", what, err)
	case ctx.Err() != nil && errors.Is(err, errNotConnected): // it says why
		return fmt.Errorf("%s: %w: %v", what, ctx.Err(), err)
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", what, ctx.Err())
	case faultOf(err) != permanent:
		return fmt.Errorf("%s: %w: %v", what, store.ErrUnavailable, err)
	}
	return fmt.Errorf("%s: %v", what, err)
}
