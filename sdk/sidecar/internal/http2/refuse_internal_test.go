// What reaches no app: requests that could mean two things, and those that are none
// (SECURITY.md T13 to T18).

package http2

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	codec "golang.org/x/net/http2"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// corpus are requests that are refused. Those that are malformed are reset.
var corpus = map[string]struct {
	fields    []string
	malformed bool
}{
	"empty segment":            {with(":path", "//admin"), false},
	"dot segment":              {with(":path", "/a/./b"), false},
	"dot dot segment":          {with(":path", "/a/../admin"), false},
	"encoded dots":             {with(":path", "/a/%2e%2e/admin"), false},
	"encoded slash":            {with(":path", "/a%2fb"), false},
	"encoded backslash":        {with(":path", "/a%5cb"), false},
	"backslash":                {with(":path", `/a\b`), false},
	"parameter":                {with(":path", "/a;b=c"), false},
	"encoded NUL":              {with(":path", "/a%00"), false},
	"encoded twice":            {with(":path", "/a%252fb"), false},
	"encoded letter":           {with(":path", "/%61dmin"), false},
	"not UTF-8":                {with(":path", "/\xff"), false},
	"fragment":                 {with(":path", "/a#b"), false},
	"fragment in the query":    {with(":path", "/a?b#c"), false},
	"space in the query":       {with(":path", "/a?b c"), false},
	"absolute form":            {with(":path", "http://orders/a"), false},
	"asterisk":                 {with(":method", "OPTIONS", ":path", "*"), false},
	"no slash":                 {with(":path", "a"), false},
	"CONNECT":                  {[]string{":method", "CONNECT", ":authority", "orders:80"}, false},
	"extended CONNECT":         {[]string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":authority", "orders", ":path", "/"}, true},
	"odd scheme":               {with(":scheme", "ftp"), false},
	"two hosts":                {with("host", "admin"), false},
	"two host fields":          {append(with(":authority", ""), "host", "orders", "host", "orders"), false},
	"no authority":             {with(":authority", ""), false},
	"userinfo":                 {with(":authority", "admin@orders"), true},
	"authority with a path":    {with(":authority", "orders/admin"), true},
	"no method":                {with(":method", ""), true},
	"no scheme":                {with(":scheme", ""), true},
	"no path":                  {with(":path", ""), true},
	"empty path":               {append(with(":path", ""), ":path", ""), true},
	"method twice":             {append([]string{":method", "GET"}, good...), true},
	"path twice":               {append([]string{":path", "/"}, good...), true},
	"authority twice":          {append([]string{":authority", "orders"}, good...), true},
	"status":                   {append([]string{":status", "200"}, good...), true},
	"pseudo field after":       {append([]string{"x-a", "1"}, good...), true},
	"unknown pseudo field":     {append([]string{":x", "1"}, good...), true},
	"method with a space":      {with(":method", "GET /admin"), true},
	"upper case":               {with("X-Spiffe-Id", "spiffe://sdktest.test/admin"), true},
	"name with a space":        {with("x a", "1"), true},
	"name with a colon":        {with("x:a", "1"), true},
	"empty name":               {append(with(), "", "1"), true},
	"name with a line end":     {with("x-a\r\nx-spiffe-id", "1"), true},
	"value with a line end":    {with("x-a", "1\r\nx-spiffe-id: spiffe://sdktest.test/admin"), true},
	"value with LF":            {with("x-a", "1\n2"), true},
	"value with NUL":           {with("x-a", "1\x002"), true},
	"space before a value":     {with("x-a", " 1"), true},
	"space after a value":      {with("x-a", "1\t"), true},
	"line end in path":         {with(":path", "/a\r\nx-a: 1"), true},
	"line end in authority":    {with(":authority", "orders\r\nx-a: 1"), true},
	"line end in method":       {with(":method", "GET\r\n"), true},
	"connection":               {with("connection", "x-a"), true},
	"transfer-encoding":        {with("transfer-encoding", "chunked"), true},
	"upgrade":                  {with("upgrade", "h2c"), true},
	"keep-alive":               {with("keep-alive", "1"), true},
	"proxy-connection":         {with("proxy-connection", "close"), true},
	"te":                       {with("te", "gzip"), true},
	"two lengths":              {append(with("content-length", "1"), "content-length", "2"), true},
	"length with a sign":       {with("content-length", "+1"), true},
	"length below nothing":     {with("content-length", "-0"), true},
	"length, underscore":       {with("content_length", "7"), true},
	"encoding, underscore":     {with("transfer_encoding", "chunked"), true},
	"length in hex":            {with("content-length", "0x1"), true},
	"length without a body":    {with("content-length", "1"), true},
	"value that is not UTF-8":  {with("x-a", "\xff"), false},
	"more bytes than allowed":  {with("x-a", strings.Repeat("a", 17<<10)), false},
	"more fields than allowed": {append(with(), strings.Split(strings.Repeat("x-a,1,", 101)+"x,y", ",")...), false},
}

func TestWhatIsRefusedReachesNobody(t *testing.T) {
	a := newApp(t, nil)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	c := r.client()
	id, n := uint32(1), 0
	for name, tt := range corpus {
		t.Run(name, func(t *testing.T) {
			c.headers(id, true, tt.fields...)
			got := c.await(id)
			if tt.malformed && (!got.isReset || got.reset != codec.ErrCodeProtocol) {
				t.Errorf("%+v; want PROTOCOL_ERROR", got)
			}
			if !tt.malformed {
				var p denial.Problem
				if got.fields[":status"] != "400" || json.Unmarshal([]byte(got.body), &p) != nil || p.Reason != policy.BadRequest || p.DecisionID != got.fields["x-decision-id"] {
					t.Errorf("%+v; want 400 and the problem document", got)
				}
			}
			n++
			if e := r.recorded(n)[n-1]; !e.Denied || e.Reason != policy.BadRequest || e.Source != r.td.ID("web").String() || e.Upstream != "" {
				t.Errorf("record %+v", e)
			}
			id += 2
		})
	}
	if seen := a.requests(); len(seen) > 0 {
		t.Fatalf("the app saw %v", seen)
	}
	c.isServed(id) // the connection is none the worse
	if seen := a.requests(); len(seen) != 1 || seen[0].uri != "/orders/1?x=1" {
		t.Errorf("the app saw %v", seen)
	}
}

// What nobody decides about here is still told apart here, before another reads it.
func TestOutboundRefusesTheSame(t *testing.T) {
	a := newApp(t, nil)
	r := newRig(t, hop.Outbound, policy.HTTP, nil, a.addr)
	c := r.client()
	id := uint32(1)
	for name, tt := range corpus {
		if name == "value that is not UTF-8" {
			continue // which only policies mind
		}
		c.headers(id, true, tt.fields...)
		if got := c.await(id); !got.isReset && got.fields[":status"] != "400" {
			t.Errorf("%s: %+v", name, got)
		}
		id += 2
	}
	if seen := a.requests(); len(seen) > 0 {
		t.Fatalf("the app saw %v", seen)
	}
	c.isServed(id)
}

func TestGRPCRefusals(t *testing.T) {
	a := newApp(t, nil)
	r := newRig(t, hop.Inbound, policy.GRPC, nil, a.addr)
	c := r.client()
	call := func(pairs ...string) []string {
		return append([]string{":method", "POST", ":scheme", "https", ":authority", "orders", ":path", "/shop.Orders/Get", "content-type", "application/grpc"}, pairs...)
	}
	replaced := func(name, value string) []string {
		fields := call()
		for i := 0; i < len(fields); i += 2 {
			if fields[i] == name {
				fields[i+1] = value
			}
		}
		return fields
	}
	for i, fields := range [][]string{
		replaced(":method", "GET"),
		replaced(":path", "/shop.Orders"),
		replaced(":path", "/shop.Orders/Get/More"),
		replaced(":path", "/shop.Orders/"),
		replaced(":path", "//Get"),
		replaced(":path", "/shop.Orders/%47et"),
		replaced(":path", "/shop.Orders/Get?x"),
		replaced("content-type", "text/plain"),
		replaced("content-type", "application/grpcx"),
		call("content-type", "text/plain"),
	} {
		id := uint32(2*i + 1)
		c.headers(id, true, fields...)
		got := c.await(id)
		if got.fields[":status"] != "200" || got.fields["grpc-status"] != "7" || reasonOf(got.fields) != policy.BadRequest {
			t.Errorf("%q: %+v", fields, got)
		}
	}
	r.recorded(10)
	if seen := a.requests(); len(seen) > 0 {
		t.Fatalf("the app saw %v", seen)
	}
	c.headers(101, true, call()...)
	if got := c.await(101); got.fields[":status"] != "200" || len(a.requests()) != 1 {
		t.Errorf("%+v", got)
	}
}

// reasonOf reads what gRPC's clients read.
func reasonOf(fields map[string]string) policy.Reason {
	data, err := base64.RawStdEncoding.DecodeString(fields["grpc-status-details-bin"])
	if err != nil {
		return ""
	}
	var p spb.Status
	if proto.Unmarshal(data, &p) != nil || p.GetCode() != int32(codes.PermissionDenied) {
		return ""
	}
	denied, ok := denial.FromStatus(status.FromProto(&p).Err())
	if !ok {
		return ""
	}
	return denied.Reason
}

func TestIdentityComesFromTLSAlone(t *testing.T) {
	a := newApp(t, nil)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	c := r.client()
	c.headers(1, false, append(with(":method", "POST"),
		"x-spiffe-id", "forged", "x-spiffe-id", "forged", "x_spiffe_id", "forged", "x-forwarded-client-cert", "forged", "x_forwarded-client_cert", "forged",
		"x-listed", "1", "x-other", "kept", "te", "trailers", "trailer", "x-spiffe-id, x-sum, x-listed")...)
	c.fr.WriteData(1, false, []byte("body"))
	c.headers(1, true, "x-spiffe-id", "forged", "x-listed", "1", "x-sum", "2", "x_spiffe_id", "forged")
	if got := c.await(1); got.fields[":status"] != "200" {
		t.Fatalf("%+v", got)
	}
	s := a.requests()[0]
	id := r.td.ID("web").String()
	if fmt.Sprint(s.header["X-Spiffe-Id"]) != "["+id+"]" || s.header.Get("X-Other") != "kept" || s.body != "body" {
		t.Errorf("the app saw %v", s)
	}
	if xfcc := s.header["X-Forwarded-Client-Cert"]; len(xfcc) != 1 || !strings.HasPrefix(xfcc[0], "By="+r.hop.To+";Hash=") || !strings.HasSuffix(xfcc[0], ";URI="+id) {
		t.Errorf("x-forwarded-client-cert %q", xfcc)
	}
	if s.trailer.Get("X-Sum") != "2" {
		t.Errorf("trailers %v", s.trailer)
	}
	for _, h := range []http.Header{s.header, s.trailer} {
		for name, values := range h {
			if strings.Contains(fmt.Sprint(values), "forged") || name == "X-Listed" && len(values) > 0 {
				t.Errorf("the app saw %s: %s", name, values)
			}
		}
	}
}

// Who waits for the agent's decision holds up nobody else, and keeps his body.
func TestTheAgentsDecisionsHoldUpNobody(t *testing.T) {
	a := newApp(t, nil)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	release := make(chan struct{})
	r.decide(func(in *policy.Input) policy.Decision {
		if in.Path == "/slow" {
			<-release
		}
		return policy.Decision{Allow: in.Path != "/denied", Reason: map[bool]policy.Reason{true: policy.Allowed, false: policy.DenyRule}[in.Path != "/denied"]}
	})
	await(t, "the agent to decide", func() bool { return !r.hop.Identity.DecidesHere() })
	c := r.client()
	c.headers(1, false, with(":method", "POST", ":path", "/slow")...)
	c.fr.WriteData(1, false, []byte("bo"))
	c.fr.WriteData(1, true, []byte("dy"))
	c.headers(3, true, with(":path", "/slow")...)
	c.fr.WriteRSTStream(3, codec.ErrCodeCancel)
	c.isServed(5)
	c.headers(7, true, with(":path", "/denied")...)
	if got := c.await(7); got.fields[":status"] != "403" {
		t.Errorf("%+v", got)
	}
	close(release)
	if got := c.await(1); got.fields[":status"] != "200" {
		t.Errorf("%+v", got)
	}
	r.recorded(4)
	for _, s := range a.requests() {
		if s.uri == "/slow" && s.body != "body" || s.uri == "/denied" {
			t.Errorf("the app saw %v", s)
		}
	}
}

func TestTrailersAreHeldToTheSameRules(t *testing.T) {
	a := newApp(t, nil)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	c := r.client()
	id := uint32(1)
	for _, fields := range [][]string{{":path", "/admin"}, {"connection", "x"}, {"X-A", "1"}, {"x-a", "1\r\nx-b: 2"}, {"x-a", strings.Repeat("a", 17<<10)}} {
		c.headers(id, false, append(with(":method", "POST"), "trailer", "x-a")...)
		c.headers(id, true, fields...)
		if got := c.await(id); !got.isReset || got.reset != codec.ErrCodeProtocol {
			t.Errorf("%.40q: %+v", fields, got)
		}
		id += 2
	}
	c.headers(id, false, with(":method", "POST")...)
	c.headers(id, false, "x-a", "1") // and no end
	if got := c.await(id); !got.isReset || got.reset != codec.ErrCodeProtocol {
		t.Errorf("%+v", got)
	}
	for _, s := range a.requests() {
		if len(s.trailer["X-A"]) > 0 {
			t.Errorf("the app saw the trailers %v", s.trailer)
		}
	}
}

// The policy sees what is forwarded, byte for byte, and every value.
func TestPolicySeesWhatIsForwarded(t *testing.T) {
	a := newApp(t, nil)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	inputs := make(chan policy.Input, 1)
	r.decide(func(in *policy.Input) policy.Decision {
		inputs <- *in
		return policy.Decision{Allow: true, Reason: policy.Allowed, Response: &policy.Response{
			Headers:         []policy.HeaderField{{Name: "x-role", Value: "reader"}},
			ResponseHeaders: []policy.HeaderField{{Name: "x-policy", Value: "seen"}, {Name: "content-type", Value: "policy's"}},
			RemoveHeaders:   []string{"x-debug"},
		}}
	})
	c := r.client()
	c.headers(1, true, append(with(":path", "/a/%C3%A4/b?q=%2e%2e//&r=1"), "x-a", "1", "x-a", "2,3", "x_a", "4", "cookie", "a=1", "cookie", "b=2", "x-role", "admin", "x_role", "admin", "x-debug", "1", "x-spiffe-id", "forged")...)
	got := c.await(1)
	if got.fields[":status"] != "200" || got.fields["x-policy"] != "seen" {
		t.Fatalf("%+v", got) // the policy may not have been asked
	}
	in := <-inputs
	want := map[string][]string{"x-a": {"1", "2,3"}, "x_a": {"4"}, "cookie": {"a=1; b=2"}, "x-role": {"admin"}, "x_role": {"admin"}, "x-debug": {"1"}}
	if fmt.Sprint(in.Headers) != fmt.Sprint(want) {
		t.Errorf("the policy saw the fields %v; want %v", in.Headers, want)
	}
	s := a.requests()[0]
	if in.Path+"?"+in.Query != "/a/%C3%A4/b?q=%2e%2e//&r=1" || s.uri != in.Path+"?"+in.Query || in.Host != "orders" || s.host != "orders" || in.Method != "GET" || in.Protocol != policy.HTTP {
		t.Errorf("the policy saw %+v, the app %v", in, s)
	}
	if fmt.Sprint(s.header["X-Role"], s.header["X_role"], s.header["X-Debug"]) != "[reader] [] []" {
		t.Errorf("the app saw %v", s.header)
	}
}
