// Whether this replica signs JWT-SVIDs. The key of one that has just joined is
// published, and signs like any other when every agent has acknowledged it;
// until then agents ask another replica.

package api

import (
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/rotation"
)

// jwtFault says why the JWT key at hand signs nothing now.
func (s *Service) jwtFault(kid string) error {
	if published := s.registry.Trust(); published == nil || !published.Keys.HasJWTAuthority(kid) {
		return askAnother("this replica's JWT key is not in the trust bundle yet: nobody could verify what it signs")
	}
	set := s.registry.Authorities()
	if len(set.All()) == 0 {
		return nil // of an older Merlon, until the root holder writes them down
	}
	// One that is old has just been followed by another, which signs any moment.
	if a, ok := set.Get(kid); ok && (a.State == rotation.Active || a.State == rotation.Old) {
		return nil
	}
	return askAnother("this replica's JWT key signs once every agent has acknowledged it: merlon authority status says who has not")
}

// askAnother is an answer after which agents ask another replica.
func askAnother(why string) error {
	st := status.New(codes.Unavailable, why)
	if detailed, err := st.WithDetails(&capb.AskAnotherReplica{}); err == nil {
		st = detailed
	}
	return st.Err()
}
