// Package bundle makes, checks, signs, verifies, serves and fetches policy
// bundles: gzipped tarballs in OPA's bundle format with the grants of a policy
// compiled to data, its Rego, and the module that evaluates both. A signed
// bundle carries, under its signature, what OPA's format lacks: a generation
// that only rises, when it was issued and until when it may be used.
package bundle

import (
	"crypto/ecdsa"
	"errors"
	"time"

	"merlon.dev/policy/grant"
)

// ContentType is the media type of policy bundles in OPA's bundle protocol.
// Clients compare it byte by byte.
const ContentType = "application/vnd.openpolicyagent.bundles"

// Caps on what is read (attack T29).
const (
	MaxBytes             = 4 << 20  // of a bundle as it travels, compressed
	maxUncompressedBytes = 32 << 20 // of the tarball in it
	maxFiles             = 2000
)

// Errors that callers tell apart.
var (
	// ErrNotModified is returned by Fetch when the server has nothing newer.
	ErrNotModified = errors.New("policy bundle not modified")
	// ErrOlder is returned by Verify for a generation below the one expected:
	// a rollback (attack T27).
	ErrOlder = errors.New("policy bundle is older than the one in use")
	// ErrNotFound is for sources of a server that have no bundle of a name.
	ErrNotFound = errors.New("no such policy bundle")
)

// Key is a public key that policy bundles are signed with.
type Key struct {
	KID       string
	PublicKey *ecdsa.PublicKey // on P-256
}

// Metadata is what the signature says about a bundle beside its files.
type Metadata struct {
	Name        string // e.g. "main"
	TrustDomain string
	Generation  uint64 // from 1, rises with every upload under a name
	IssuedAt    time.Time
	NotAfter    time.Time // zero: no end
	Audience    []string  // SPIFFE IDs of the destinations it is for; empty: all
	// Candidate: it is to be tried beside the policy in force, and is not that.
	Candidate bool
}

// Expect is what Verify demands of a bundle's metadata.
type Expect struct {
	Name, TrustDomain string // empty: any
	// MinGeneration is the highest generation seen under this name, which the
	// caller keeps across restarts. The same generation is accepted again.
	MinGeneration uint64
	// Candidate: a candidate is expected; otherwise none is taken.
	Candidate bool
}

// Contents is a bundle taken apart. The caller may keep but not change it.
type Contents struct {
	Metadata Metadata          // zero for an unsigned bundle
	Modules  map[string]string // Rego by file name, engine.ModuleName among them
	Grants   []grant.Grant     // sorted by ID
}
