// What a client can put on the wire that no gRPC library would: methods that name
// two things at once, and header fields that come twice. The client is a framer of
// HTTP/2, the policy is one of grants and Rego.

package grpcauth_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/policy"
	"merlon.dev/policy/engine"
	"merlon.dev/policy/grant"
	"merlon.dev/sdk/sdktest"
)

const unaryCall = "/grpc.testing.TestService/UnaryCall"

// answered is how a call ended.
type answered struct {
	how    string // "OK", a code of gRPC, or what HTTP/2 says
	reason string // of a denial
	id     string // of the decision
}

// rawCall sends a call with this :path as HTTP/2 frames, and fields after those that
// every call has.
func rawCall(t *testing.T, address string, td *sdktest.TD, path string, fields ...hpack.HeaderField) answered {
	t.Helper()
	own := td.SVID("web")
	conn, err := tls.Dial("tcp", address, &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true,
		NextProtos:         []string{"h2"},
		Certificates:       []tls.Certificate{{Certificate: [][]byte{own.Certificates[0].Raw}, PrivateKey: own.PrivateKey}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.WriteString(conn, http2.ClientPreface)
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = framer.WriteSettings()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "https"},
		{Name: ":path", Value: path},
		{Name: ":authority", Value: "orders"},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "te", Value: "trailers"},
	}, fields...) {
		_ = enc.WriteField(f)
	}
	_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	_ = framer.WriteData(1, true, make([]byte, 5)) // one empty message
	return answerOf(t, framer)
}

func answerOf(t *testing.T, framer *http2.Framer) answered {
	t.Helper()
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the call was not answered: %v", err)
			}
			return answered{how: err.Error()}
		}
		switch f := frame.(type) {
		case *http2.MetaHeadersFrame:
			if f.StreamEnded() {
				return trailers(t, f)
			}
		case *http2.RSTStreamFrame:
			return answered{how: "reset: " + f.ErrCode.String()}
		case *http2.GoAwayFrame:
			return answered{how: "goaway: " + f.ErrCode.String()}
		}
	}
}

// trailers reads what the last frame of headers says.
func trailers(t *testing.T, f *http2.MetaHeadersFrame) answered {
	t.Helper()
	a := answered{how: "http " + f.PseudoValue("status")}
	for _, field := range f.Fields {
		switch field.Name {
		case "grpc-status":
			var code codes.Code
			if err := code.UnmarshalJSON([]byte(field.Value)); err != nil {
				t.Fatal(err)
			}
			a.how = code.String()
		case "grpc-status-details-bin":
			raw, err := base64.RawStdEncoding.DecodeString(field.Value)
			if err != nil {
				t.Fatal(err)
			}
			var st rpcstatus.Status
			if err := proto.Unmarshal(raw, &st); err != nil {
				t.Fatal(err)
			}
			for _, d := range status.FromProto(&st).Details() {
				if info, ok := d.(*errdetails.ErrorInfo); ok {
					a.reason, a.id = info.GetReason(), info.GetMetadata()["decision_id"]
				}
			}
		}
	}
	return a
}

// decideBy has td decide by a policy of grants and Rego, and gives every call that it
// was asked about.
func decideBy(t *testing.T, td *sdktest.TD, grants, rego string) <-chan *policy.Input {
	t.Helper()
	list, err := grant.Parse([]grant.File{{Name: "grants.yaml", Data: []byte(grants)}})
	if err != nil {
		t.Fatal(err)
	}
	src := engine.Source{Grants: list, Generation: 1}
	if rego != "" {
		src.Modules = map[string]string{"own.rego": rego}
	}
	e, err := engine.New(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan *policy.Input, 100)
	td.Decide(func(in *policy.Input) policy.Decision {
		asked <- in
		return e.Authorize(context.Background(), in)
	})
	return asked
}

// decidedCall is rawCall, made again where a decision took too long on a busy machine.
func decidedCall(t *testing.T, address string, td *sdktest.TD, path string, asked <-chan *policy.Input) answered {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		got := rawCall(t, address, td, path)
		late := got.reason == string(policy.Error) || got.reason == string(policy.AgentUnavailable)
		if !late || time.Now().After(deadline) {
			return got
		}
		for len(asked) > 0 {
			<-asked
		}
	}
}

// T15: each of these is the granted method to somebody, and is refused: what is no
// method at all before any policy, and what is another one by the policy. The
// service serves whatever it is asked for.
func TestT15PathTricksReachNoHandler(t *testing.T) {
	td := sdktest.New(t)
	asked := decideBy(t, td, `grants:
  - {id: web-calls-unary, from: [spiffe://sdktest.test/web], to: [spiffe://sdktest.test/orders], grpc: {services: [grpc.testing.TestService], methods: [UnaryCall]}}
`, "")
	s := &service{}
	address := start(t, td.Workload("orders"), s)
	const (
		badRequest = string(policy.BadRequest)
		unknown    = "" // grpc-go answers it, before anything of ours
	)
	for path, reason := range map[string]string{
		// Without the slash in front: served by some, and another string to the policy.
		"grpc.testing.TestService/UnaryCall": unknown, "": unknown, "*": unknown, "UnaryCall": unknown,
		"http://orders" + unaryCall: unknown,
		// One slash less.
		"/": unknown, "/UnaryCall": unknown, `/grpc.testing.TestService\UnaryCall`: unknown,
		"/grpc.testing.TestService%2fUnaryCall": unknown, "/grpc.testing.TestService%2FUnaryCall": unknown,
		// One slash more.
		"/" + unaryCall: badRequest, "/grpc.testing.TestService//UnaryCall": badRequest, unaryCall + "/": badRequest, unaryCall + "//": badRequest,
		"/x" + unaryCall: badRequest, "/a/": badRequest, "/a//": badRequest, "/a/b/c": badRequest,
		// What some decode, cut off or clean away.
		"/grpc.testing.TestService/%55naryCall":  badRequest,
		"/grpc.testing.TestService/UnaryCall%00": badRequest, "/grpc.testing.TestService/UnaryCall%2e": badRequest, "/grpc.testing.TestService/Unary%2543all": badRequest,
		"/grpc.testing.TestService/..": badRequest, "/grpc.testing.TestService/../grpc.testing.TestService/UnaryCall": badRequest, "/." + unaryCall: badRequest,
		unaryCall + "?x": badRequest, unaryCall + "#x": badRequest, unaryCall + ";x": badRequest,
		// Wrong case and unknown methods: well formed, and granted to nobody.
		"/grpc.testing.TestService/unarycall": string(policy.MethodNotGranted), "/grpc.testing.TestService/UNARYCALL": string(policy.MethodNotGranted),
		"/grpc.testing.TestService/Unknown": string(policy.MethodNotGranted), "/grpc.testing.TestService/UnaryCall2": string(policy.MethodNotGranted),
		"/grpc.testing.testservice/UnaryCall": string(policy.PathNotGranted), "/TestService/UnaryCall": string(policy.PathNotGranted),
		"/grpc.testing.TestService./UnaryCall": string(policy.PathNotGranted), "/unknown.Service/Method": string(policy.PathNotGranted),
	} {
		got := decidedCall(t, address, td, path, asked)
		switch {
		case reason == unknown:
			if got.how == "OK" || got.reason != "" {
				t.Errorf(":path %q = %+v; want it refused", path, got)
			}
		case got.how != "PermissionDenied" && got.how != "InvalidArgument", got.reason != reason, len(got.id) != 24:
			t.Errorf(":path %q = %+v; want %s with a decision ID", path, got, reason)
		}
		byPolicy := reason != unknown && reason != badRequest
		select {
		case in := <-asked:
			if !byPolicy || in.Path != path {
				t.Errorf(":path %q: the policy was asked about %q", path, in.Path)
			}
		default:
			if byPolicy {
				t.Errorf(":path %q: the policy was not asked", path)
			}
		}
	}
	for _, path := range []string{unaryCall + "\x01", unaryCall + "\r\n", unaryCall + "\xff"} { // no field of HTTP/2
		if got := rawCall(t, address, td, path); got.how == "OK" {
			t.Errorf(":path %q = %+v", path, got)
		}
	}
	if n := s.calls.Load(); n != 0 {
		t.Errorf("%d calls were served", n)
	}
	if got := rawCall(t, address, td, unaryCall); got.how != "OK" || s.calls.Load() != 1 {
		t.Errorf("a good call: %+v, %d served", got, s.calls.Load())
	}
}

// T16: the policy sees every value of a field, as the handler does, whichever way they
// were sent.
func TestT16PolicySeesEveryValueOfAField(t *testing.T) {
	td := sdktest.New(t)
	asked := decideBy(t, td, "grants:\n  - {id: all, grpc: {}}\n", `package authz

deny if {
	some value in input.attributes.request.http.headers_all["x-role"]
	contains(value, "admin")
}
`)
	s := &service{md: make(chan metadata.MD, 1)}
	address := start(t, td.Workload("orders"), s)
	role := func(value string) hpack.HeaderField { return hpack.HeaderField{Name: "x-role", Value: value} }
	for name, tt := range map[string]struct {
		fields []hpack.HeaderField
		seen   policy.HeaderMap
		denied bool
	}{
		"one":                      {[]hpack.HeaderField{role("user")}, policy.HeaderMap{"x-role": {"user"}}, false},
		"twice the same":           {[]hpack.HeaderField{role("user"), role("user")}, policy.HeaderMap{"x-role": {"user", "user"}}, false},
		"the second counts":        {[]hpack.HeaderField{role("user"), role("admin")}, policy.HeaderMap{"x-role": {"user", "admin"}}, true},
		"the first counts":         {[]hpack.HeaderField{role("admin"), role("user")}, policy.HeaderMap{"x-role": {"admin", "user"}}, true},
		"others between":           {[]hpack.HeaderField{role("user"), {Name: "x-a", Value: "1"}, role("admin")}, policy.HeaderMap{"x-role": {"user", "admin"}, "x-a": {"1"}}, true},
		"joined by a comma":        {[]hpack.HeaderField{role("user, admin")}, policy.HeaderMap{"x-role": {"user, admin"}}, true},
		"joined, and once more":    {[]hpack.HeaderField{role("user,guest"), role("admin")}, policy.HeaderMap{"x-role": {"user,guest", "admin"}}, true},
		"empty and not":            {[]hpack.HeaderField{role(""), role("admin")}, policy.HeaderMap{"x-role": {"", "admin"}}, true},
		"a tab within":             {[]hpack.HeaderField{role("user\tadmin")}, policy.HeaderMap{"x-role": {"user\tadmin"}}, true},
		"an underscore is another": {[]hpack.HeaderField{role("user"), {Name: "x_role", Value: "admin"}}, policy.HeaderMap{"x-role": {"user"}, "x_role": {"admin"}}, false},
		"binary, twice":            {[]hpack.HeaderField{{Name: "x-bin", Value: "YQ"}, {Name: "x-bin", Value: "Yg=="}}, policy.HeaderMap{"x-bin": {"YQ", "Yg"}}, false},
	} {
		got := rawCall(t, address, td, unaryCall, tt.fields...)
		in := <-asked
		for _, always := range []string{"content-type", "user-agent", "te"} {
			delete(in.HeaderMap(), always)
		}
		if !cmp.Equal(in.HeaderMap(), tt.seen) {
			t.Errorf("%s: the policy saw (-got +want):\n%s", name, cmp.Diff(in.HeaderMap(), tt.seen))
		}
		if tt.denied {
			if got.how != "PermissionDenied" || got.reason != string(policy.DenyRule) {
				t.Errorf("%s: %+v; want it denied", name, got)
			}
			continue
		}
		if got.how != "OK" {
			t.Fatalf("%s: %+v; want it allowed", name, got)
		}
		md := <-s.md
		for field, values := range tt.seen {
			if !strings.HasSuffix(field, "-bin") && !slices.Equal(md[field], values) {
				t.Errorf("%s: the handler saw %q in %s; the policy %q", name, md[field], field, values)
			}
		}
	}
	if n := s.calls.Load(); n != 4 {
		t.Errorf("%d calls were served; want 4", n)
	}
}

// T16: what HTTP/2 has no fields for reaches neither policy nor handler.
func TestT16MalformedFieldsAreRefused(t *testing.T) {
	td := sdktest.New(t)
	asked := decideBy(t, td, "grants:\n  - {id: all, grpc: {}}\n", "")
	s := &service{}
	address := start(t, td.Workload("orders"), s)
	for name, field := range map[string]hpack.HeaderField{
		"upper case":     {Name: "X-Role", Value: "user"},
		"mixed case":     {Name: "x-Role", Value: "user"},
		"space in name":  {Name: "x-role ", Value: "user"},
		"tab in name":    {Name: "x\trole", Value: "user"},
		"colon in name":  {Name: "x:role", Value: "user"},
		"no name":        {Name: "", Value: "user"},
		"line feed":      {Name: "x-role", Value: "user\nx-role: admin"},
		"CR LF":          {Name: "x-role", Value: "user\r\nx-role: admin"},
		"NUL":            {Name: "x-role", Value: "user\x00admin"},
		"second path":    {Name: ":path", Value: "/grpc.testing.TestService/EmptyCall"},
		"connection":     {Name: "connection", Value: "x-role"},
		"comma in -bin":  {Name: "x-bin", Value: "YQ,Yg"},
		"not base64":     {Name: "x-bin", Value: "*"},
		"second host":    {Name: ":authority", Value: "admin"},
		"response field": {Name: ":status", Value: "200"},
	} {
		if got := rawCall(t, address, td, unaryCall, field); got.how == "OK" {
			t.Errorf("%s = %+v", name, got)
		}
	}
	select {
	case in := <-asked:
		t.Errorf("the policy was asked about %+v", in)
	default:
	}
	if n := s.calls.Load(); n != 0 {
		t.Errorf("%d calls were served", n)
	}
}
