// The Workload Endpoint and API, asked as a workload would (Workload Endpoint; Workload
// API). The tool needs an identity of its own there.

package main

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"merlon.dev/integration/conform/jwtcase"
)

const (
	header = "workload.spiffe.io"
	// patience is how long one call may take. The first message of a stream has to
	// come at once; a machine under load is given some time.
	patience = 5 * time.Second
)

// workloadAPI is one, as a workload calls it.
type workloadAPI struct {
	cc  *grpc.ClientConn
	api workload.SpiffeWorkloadAPIClient
}

func dialEndpoint(address string) (*workloadAPI, error) {
	cc, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &workloadAPI{cc: cc, api: workload.NewSpiffeWorkloadAPIClient(cc)}, nil
}

// called is a context with the header, that ends after patience.
func called(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	return metadata.AppendToOutgoingContext(ctx, header, "true"), cancel
}

// first is the first message of a stream, which then ends.
func first[M any](ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[M], error)) (*M, error) {
	ctx, cancel := called(ctx)
	defer cancel()
	stream, err := open(ctx)
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

func (e *workloadAPI) x509SVIDs(ctx context.Context) (*workload.X509SVIDResponse, error) {
	return first(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.X509SVIDResponse], error) {
		return e.api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	})
}

func (e *workloadAPI) x509Bundles(ctx context.Context) (*workload.X509BundlesResponse, error) {
	return first(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.X509BundlesResponse], error) {
		return e.api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	})
}

func (e *workloadAPI) jwtBundles(ctx context.Context) (*workload.JWTBundlesResponse, error) {
	return first(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.JWTBundlesResponse], error) {
		return e.api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	})
}

func (e *workloadAPI) jwtSVIDs(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	ctx, cancel := called(ctx)
	defer cancel()
	return e.api.FetchJWTSVID(ctx, req)
}

func (e *workloadAPI) validate(ctx context.Context, audience, token string) (*workload.ValidateJWTSVIDResponse, error) {
	ctx, cancel := called(ctx)
	defer cancel()
	return e.api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: token})
}

// checkEndpoint makes every check of a Workload API, and gives the tool's own SPIFFE
// ID there.
func checkEndpoint(ctx context.Context, r *report, address string) (*workloadAPI, spiffeid.ID, error) {
	e, err := dialEndpoint(address)
	if err != nil {
		return nil, spiffeid.ID{}, err
	}
	began := time.Now()
	svids, err := e.x509SVIDs(ctx)
	if err != nil {
		err = r.must("E9", api, fmt.Errorf("FetchX509SVID at %s: %w; this process needs an identity there", address, err))
		return nil, spiffeid.ID{}, errors.Join(err, e.cc.Close())
	}
	took := time.Since(began)
	r.ok("E1", api)
	r.ok("E3", api)
	r.ok("E20", api)
	r.check("E10", api, within(took, 2*time.Second))
	own, err := checkX509SVIDs(r, svids)
	if err != nil {
		return nil, spiffeid.ID{}, errors.Join(r.must("E13", api, err), e.cc.Close())
	}
	e.checkHeader(ctx, r)
	e.checkMethods(ctx, r)
	e.checkProfiles(ctx, r, own)
	e.checkJWTSVIDs(ctx, r, own)
	return e, own, nil
}

func within(took, limit time.Duration) error {
	if took > limit {
		return fmt.Errorf("the first message came after %s", took.Round(time.Millisecond))
	}
	return nil
}

// checkHeader calls every RPC without the header, and with others.
func (e *workloadAPI) checkHeader(ctx context.Context, r *report) {
	rpcs := map[string]func(context.Context) error{
		"FetchX509SVID": func(ctx context.Context) error { return ends(e.api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})) },
		"FetchX509Bundles": func(ctx context.Context) error {
			return ends(e.api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{}))
		},
		"FetchJWTBundles": func(ctx context.Context) error {
			return ends(e.api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{}))
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := e.api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{jwtcase.Audience}})
			return err
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			_, err := e.api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: jwtcase.Audience, Svid: "a.b.c"})
			return err
		},
	}
	for what, md := range map[string]metadata.MD{
		"no header": {}, "the header True": {header: {"True"}}, "the header TRUE": {header: {"TRUE"}}, "an empty header": {header: {""}},
		"the header false": {header: {"false"}}, "the header workload-spiffe-io": {"workload-spiffe-io": {"true"}},
	} {
		for name, call := range rpcs {
			ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(ctx, md), patience)
			err := call(ctx)
			cancel()
			if status.Code(err) != codes.InvalidArgument {
				err = fmt.Errorf("%s with %s: %s, want InvalidArgument", name, what, status.Code(err))
			} else {
				err = nil
			}
			r.check("E2", api, err)
		}
	}
}

// ends is the error of a stream's first message.
func ends[M any](stream grpc.ServerStreamingClient[M], err error) error {
	if err == nil {
		_, err = stream.Recv()
	}
	return err
}

// checkMethods holds the service against the standard's proto, by reflection, and asks
// for the WIT profile.
func (e *workloadAPI) checkMethods(ctx context.Context, r *report) {
	methods, err := e.reflected(ctx)
	if err != nil {
		r.check("E8", api, err)
	} else {
		r.ok("E8", api)
		allowed := []string{"FetchJWTBundles", "FetchJWTSVID", "FetchWITBundles", "FetchWITSVID", "FetchX509Bundles", "FetchX509SVID", "ValidateJWTSVID"}
		for _, m := range methods {
			if !slices.Contains(allowed, m) {
				r.fail("E7", api, "SpiffeWorkloadAPI has a method %s, which the standard does not have", m)
			}
		}
		r.ok("E7", api)
	}
	for _, rpc := range []string{"FetchWITSVID", "FetchWITBundles"} {
		ctx, cancel := called(ctx)
		stream, err := e.cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/SpiffeWorkloadAPI/"+rpc)
		if err == nil {
			if err = sent(stream.SendMsg(&workload.X509BundlesRequest{})); err == nil {
				err = errors.Join(stream.CloseSend(), stream.RecvMsg(&workload.X509BundlesResponse{}))
			}
		}
		cancel()
		switch status.Code(err) {
		case codes.Unimplemented:
			r.ok("W15", api)
		case codes.OK:
			r.ok("W15", api)
			r.remark("W15", "%s is there: the WIT profile is Incubating, and nothing of it is checked here", rpc)
		default:
			r.fail("W15", api, "%s: %s, want Unimplemented", rpc, status.Code(err))
		}
	}
}

// sent is the error of a stream's Send, of which io.EOF says that the stream has ended
// already: only Recv knows by what.
func sent(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// reflected gives the methods of SpiffeWorkloadAPI as gRPC reflection has them.
func (e *workloadAPI) reflected(ctx context.Context) ([]string, error) {
	ctx, cancel := called(ctx)
	defer cancel()
	stream, err := reflectionpb.NewServerReflectionClient(e.cc).ServerReflectionInfo(ctx)
	if err != nil {
		return nil, err
	}
	err = sent(stream.Send(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "SpiffeWorkloadAPI"},
	}))
	if err != nil {
		return nil, err
	}
	res, err := stream.Recv()
	if err != nil {
		return nil, fmt.Errorf("reflection: %w", err)
	}
	var methods []string
	for _, text := range res.GetFileDescriptorResponse().GetFileDescriptorProto() {
		var file descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(text, &file); err != nil {
			return nil, fmt.Errorf("reflection: %w", err)
		}
		for _, service := range file.GetService() {
			if service.GetName() == "SpiffeWorkloadAPI" && file.GetPackage() == "" {
				for _, m := range service.GetMethod() {
					methods = append(methods, m.GetName())
				}
			}
		}
	}
	if len(methods) == 0 {
		return nil, errors.New("reflection knows no SpiffeWorkloadAPI")
	}
	return methods, nil
}

// checkProfiles fetches the bundles of both kinds.
func (e *workloadAPI) checkProfiles(ctx context.Context, r *report, own spiffeid.ID) {
	td := own.TrustDomain().IDString()
	x509Bundles, err := e.x509Bundles(ctx)
	r.check("E9", api, err)
	if err == nil {
		roots, err := x509.ParseCertificates(x509Bundles.GetBundles()[td])
		if err == nil && len(roots) == 0 {
			err = errors.New("FetchX509Bundles has no bundle of " + td)
		}
		r.check("E14", api, err)
		r.check("F-8", api, keyedByTrustDomain(x509Bundles.GetBundles()))
		for _, root := range roots {
			checkSigning(r, root, own.TrustDomain())
		}
	}
	jwtBundles, err := e.jwtBundles(ctx)
	r.check("E9", api, err)
	if err == nil {
		document, ok := jwtBundles.GetBundles()[td]
		if !ok {
			r.fail("E14", api, "FetchJWTBundles has no bundle of %s", td)
		}
		r.check("F-8", api, keyedByTrustDomain(jwtBundles.GetBundles()))
		r.check("E15", api, jwtKeysOnly(document))
		checkShared(r, x509Bundles.GetBundles(), jwtBundles.GetBundles())
	}
}

// checkShared: a key is in the bundle of one trust domain, and for X.509 or for JWT.
func checkShared(r *report, x509Bundles, jwtBundles map[string][]byte) {
	of := make(map[string]string)
	see := func(key crypto.PublicKey, where string) {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return // others say what is wrong with it
		}
		other := of[string(der)]
		r.check("B9", issuer, failIf(other != "" && other != where, "one key is in %s and in %s", other, where))
		of[string(der)] = where
	}
	for _, td := range slices.Sorted(maps.Keys(x509Bundles)) {
		certs, err := x509.ParseCertificates(x509Bundles[td])
		if err != nil {
			continue
		}
		for _, c := range certs {
			see(c.PublicKey, "the X.509 bundle of "+td)
		}
	}
	for _, td := range slices.Sorted(maps.Keys(jwtBundles)) {
		var set jose.JSONWebKeySet
		if json.Unmarshal(jwtBundles[td], &set) != nil {
			continue
		}
		for _, k := range set.Keys {
			see(k.Key, "the JWT bundle of "+td)
		}
	}
}

func keyedByTrustDomain(bundles map[string][]byte) error {
	for name := range bundles {
		if td, err := spiffeid.TrustDomainFromString(name); err != nil || td.IDString() != name {
			return fmt.Errorf("a bundle's key is %q, which is no SPIFFE ID of a trust domain", name)
		}
	}
	return nil
}

// jwtKeysOnly: the JWKS of FetchJWTBundles has no keys of other uses.
func jwtKeysOnly(document []byte) error {
	var set struct {
		Keys []struct {
			Use string          `json:"use"`
			Kid string          `json:"kid"`
			X5C json.RawMessage `json:"x5c"`
		} `json:"keys"`
	}
	if err := json.Unmarshal(document, &set); err != nil {
		return fmt.Errorf("the JWKS of FetchJWTBundles: %w", err)
	}
	for _, k := range set.Keys {
		if k.Use != "" && k.Use != "jwt-svid" || len(k.X5C) > 0 || k.Kid == "" {
			return fmt.Errorf("the JWKS of FetchJWTBundles has a key of use %q and kid %q", k.Use, k.Kid)
		}
	}
	return nil
}

// checkJWTSVIDs fetches and validates JWT-SVIDs.
func (e *workloadAPI) checkJWTSVIDs(ctx context.Context, r *report, own spiffeid.ID) {
	for what, req := range map[string]*workload.JWTSVIDRequest{
		"no audience": {}, "an empty audience": {Audience: []string{""}},
	} {
		_, err := e.jwtSVIDs(ctx, req)
		r.check("E12", api, wants(err, codes.InvalidArgument, "FetchJWTSVID with "+what))
	}
	somebody := own.TrustDomain().IDString() + "/spiffe-conform/somebody-else"
	_, err := e.jwtSVIDs(ctx, &workload.JWTSVIDRequest{Audience: []string{jwtcase.Audience}, SpiffeId: somebody})
	r.check("E15", api, wants(err, codes.PermissionDenied, "FetchJWTSVID for a SPIFFE ID that is not this process's"))
	r.check("E6", api, wants(err, codes.PermissionDenied, "FetchJWTSVID for a SPIFFE ID that is not this process's"))
	_, err = e.validate(ctx, jwtcase.Audience, "not a token")
	r.check("E6", api, wants(err, codes.InvalidArgument, "ValidateJWTSVID of no token"))

	res, err := e.jwtSVIDs(ctx, &workload.JWTSVIDRequest{Audience: []string{jwtcase.Audience}})
	if err != nil || len(res.GetSvids()) == 0 {
		r.fail("E9", api, "FetchJWTSVID: %d JWT-SVIDs, %v", len(res.GetSvids()), err)
		return
	}
	r.ok("E9", api)
	for _, s := range res.GetSvids() {
		checkToken(r, s.GetSvid(), s.GetSpiffeId(), time.Now())
		checked, err := e.validate(ctx, jwtcase.Audience, s.GetSvid())
		if err == nil && checked.GetSpiffeId() != s.GetSpiffeId() {
			err = fmt.Errorf("ValidateJWTSVID names %q", checked.GetSpiffeId())
		}
		if err == nil && len(checked.GetClaims().GetFields()) == 0 {
			err = errors.New("ValidateJWTSVID gives no claims")
		}
		r.check("E16", api, err)
		_, err = e.validate(ctx, jwtcase.Audience+"-other", s.GetSvid())
		r.check("E16", api, wants(err, codes.InvalidArgument, "ValidateJWTSVID for another audience"))
	}
}

func wants(err error, want codes.Code, what string) error {
	if got := status.Code(err); got != want {
		return fmt.Errorf("%s: %s, want %s", what, got, want)
	}
	return nil
}

// checkX509SVIDs holds an answer of FetchX509SVID against the standard.
func checkX509SVIDs(r *report, res *workload.X509SVIDResponse) (own spiffeid.ID, err error) {
	if len(res.GetSvids()) == 0 {
		return own, errors.New("FetchX509SVID: no X509-SVID")
	}
	hints := make(map[string]bool)
	for i, s := range res.GetSvids() {
		chain, err := x509.ParseCertificates(s.GetX509Svid())
		if err != nil || len(chain) == 0 {
			return own, fmt.Errorf("FetchX509SVID: the chain of %s: %w", s.GetSpiffeId(), err)
		}
		id, err := spiffeid.FromString(s.GetSpiffeId())
		if err != nil {
			return own, fmt.Errorf("FetchX509SVID: %w", err)
		}
		if i == 0 {
			own = id
		}
		r.check("E13", api, checkAnswer(s, chain))
		if hint := s.GetHint(); hint != "" {
			r.check("E18", api, hintFits(hint))
			if hints[hint] {
				r.fail("E13", api, "two X509-SVIDs have the hint %q", hint)
			}
			hints[hint] = true
		}
		roots, err := x509.ParseCertificates(s.GetBundle())
		if err != nil || len(roots) == 0 {
			r.fail("E14", api, "FetchX509SVID: no trust bundle for %s: %v", id, err)
		} else {
			r.ok("E14", api)
		}
		checkLeaf(r, chain[0], id)
		for _, authority := range chain[1:] {
			checkSigning(r, authority, id.TrustDomain())
		}
	}
	r.ok("E18", api)
	return own, nil
}

func hintFits(hint string) error {
	if len(hint) > 1024 {
		return fmt.Errorf("a hint has %d bytes", len(hint))
	}
	return nil
}

// checkAnswer: leaf first, and its key in PKCS #8.
func checkAnswer(s *workload.X509SVID, chain []*x509.Certificate) error {
	signer, err := key(s.GetX509SvidKey())
	if err != nil {
		return fmt.Errorf("the key of %s is not PKCS #8: %w", s.GetSpiffeId(), err)
	}
	leafKey, err := x509.MarshalPKIXPublicKey(chain[0].PublicKey)
	if err != nil {
		return err
	}
	ownKey, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return err
	}
	if !slices.Equal(leafKey, ownKey) {
		return fmt.Errorf("the key of %s is not that of the first certificate", s.GetSpiffeId())
	}
	if len(chain[0].URIs) != 1 || !strings.EqualFold(chain[0].URIs[0].String(), s.GetSpiffeId()) {
		return fmt.Errorf("the first certificate of %s is another one's", s.GetSpiffeId())
	}
	return nil
}
