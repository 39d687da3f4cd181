// Where the verbs of merlon policy find a policy: in a folder, in a file that
// `merlon policy build` wrote, or at the CA, by its generation.

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
	"merlon.dev/policy/engine"
)

// namedPolicy is a policy and what to call it.
type namedPolicy struct {
	name     string // "./policy", "generation 3"
	contents *bundle.Contents
	engine   *engine.Engine
}

// openPolicy finds the policy that where means: a folder, a file, the number of a
// generation of the policy bundle called name, or, where it is empty, the
// generation in force.
func (o *options) openPolicy(ctx context.Context, where, name string) (*namedPolicy, error) {
	info, err := os.Stat(where)
	generation, notNumber := strconv.ParseUint(where, 10, 64)
	var p *namedPolicy
	switch {
	case where == "" || err != nil && notNumber == nil && generation > 0:
		p, err = o.fetchPolicy(ctx, generation, name)
	case err == nil && !info.IsDir():
		p, err = readBundle(where)
	default: // a folder, or nothing, which is said then
		var f *bundle.Folder
		if f, err = policyFolder(where); err == nil {
			p = &namedPolicy{name: where, contents: f.Contents()}
		}
	}
	if err != nil {
		return nil, err
	}
	md := p.contents.Metadata
	p.engine, err = engine.New(ctx, engine.Source{Modules: p.contents.Modules, Grants: p.contents.Grants, Generation: md.Generation, NotAfter: md.NotAfter})
	return p, err
}

// timeFlag reads a flag that gives a time; empty means now.
func timeFlag(flag, value string) (time.Time, error) {
	if value == "" {
		return time.Now(), nil
	}
	at, err := time.Parse(time.RFC3339, value)
	if err != nil {
		return time.Time{}, usageError{fmt.Sprintf("--%s %q is no time", flag, value), "for example --" + flag + " 2027-01-01T00:00:00Z"}
	}
	return at, nil
}

// readBundle reads as much of file as a bundle may be long, and no more: it may be a
// pipe or a device, which have no end.
func readBundle(file string) (*namedPolicy, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, bundle.MaxBytes+1)) // one more is refused
	if err != nil {
		return nil, fmt.Errorf("read policy bundle: %w", err)
	}
	contents, err := bundle.Check(raw)
	if err != nil {
		return nil, hintError{fmt.Errorf("%s: %w", file, err), "merlon policy build FOLDER --file " + file + " makes one that can be read here; a signed one the CA knows by its generation"}
	}
	return &namedPolicy{name: file, contents: contents}, nil
}

// fetchPolicy gets a generation from the CA and verifies its signature; 0 is the
// active one.
func (o *options) fetchPolicy(ctx context.Context, generation uint64, name string) (*namedPolicy, error) {
	var signed *capb.FetchPolicyResponse
	if err := o.withCA(ctx, func(ca capb.AdminClient) (err error) {
		signed, err = ca.FetchPolicy(ctx, &capb.FetchPolicyRequest{Name: name, Generation: generation}, grpc.MaxCallRecvMsgSize(2*bundle.MaxBytes))
		if status.Code(err) == codes.NotFound {
			err = hintError{err, "merlon policy history lists those that are; leave the number out for the generation in force, or name the folder of the policy"}
		}
		return err
	}); err != nil {
		return nil, err
	}
	keys := make([]bundle.Key, 0, len(signed.GetKeys()))
	for _, k := range signed.GetKeys() {
		public, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("read policy key %s: %v", k.GetKid(), err)
		}
		if ec, ok := public.(*ecdsa.PublicKey); ok {
			keys = append(keys, bundle.Key{KID: k.GetKid(), PublicKey: ec})
		}
	}
	contents, err := bundle.Verify(signed.GetBundle(), keys, bundle.Expect{Name: name, Candidate: signed.GetCandidate()})
	if err != nil {
		return nil, err
	}
	return &namedPolicy{name: fmt.Sprintf("generation %d", contents.Metadata.Generation), contents: contents}, nil
}
