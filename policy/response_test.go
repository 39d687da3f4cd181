// What a policy may have sent, and what not.

package policy

import (
	"strings"
	"testing"
)

func TestResponsesThatCannotBeSent(t *testing.T) {
	header := func(name, value string) Response {
		return Response{Headers: []HeaderField{{name, value}}}
	}
	for name, tt := range map[string]struct {
		r    Response
		want string
	}{
		"informational":   {Response{Status: 101}, "http_status 101"},
		"no status":       {Response{Status: 600}, "http_status 600"},
		"negative":        {Response{Status: -1}, "http_status -1"},
		"long body":       {Response{Body: strings.Repeat("a", maxResponseBody+1)}, "body is longer"},
		"bad body":        {Response{Body: "\xff"}, "body is not valid UTF-8"},
		"many fields":     {Response{RemoveHeaders: make([]string, maxResponseFields+1)}, "more than 100 header fields"},
		"empty name":      {header("", "a"), "is no name"},
		"pseudo":          {header(":path", "/admin"), "is no name"},
		"upper case":      {header("X-A", "a"), "is no name"},
		"space":           {header("x a", "a"), "is no name"},
		"line end":        {header("x-a", "a\r\nx-b: c"), "cannot be sent"},
		"NUL":             {header("x-a", "a\x00"), "cannot be sent"},
		"bad UTF-8":       {header("x-a", "\xff"), "cannot be sent"},
		"identity":        {header("x-spiffe-id", "spiffe://a.test/admin"), "claims an identity"},
		"with underscore": {header("x_forwarded-client_cert", "a"), "claims an identity"},
		"framing":         {header("transfer-encoding", "chunked"), "not a policy's"},
		"host":            {header("host", "admin"), "not a policy's"},
		"gRPC status":     {header("grpc-status", "0"), "not a policy's"},
		"binary":          {header("x-bin", "a"), "not a policy's"},
		"decision ID":     {header("x-decision-id", "a"), "not a policy's"},
		"in the answer":   {Response{ResponseHeaders: []HeaderField{{"content-length", "0"}}}, "not a policy's"},
		"removed":         {Response{RemoveHeaders: []string{"host"}}, "not a policy's"},
	} {
		if err := tt.r.Check(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", name, err, tt.want)
		}
	}
	good := Response{Status: 302, Body: "é", Headers: []HeaderField{{"location", "/login?a=b\té"}}, RemoveHeaders: []string{"x-spiffe-id"}}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
}

func TestReplacesKnowsEveryWayToWriteAName(t *testing.T) {
	r := Response{Headers: []HeaderField{{"x-role", "a"}}, RemoveHeaders: []string{"x_debug"}}
	for name, want := range map[string]bool{"x-role": true, "X-Role": true, "X_ROLE": true, "x-debug": true, "x-role2": false, "": false} {
		if r.Replaces(name) != want {
			t.Errorf("%q: %v; want %v", name, !want, want)
		}
	}
}

func TestDenialStatus(t *testing.T) {
	custom := &Response{Status: 401}
	for _, tt := range []struct {
		d    Decision
		want int
	}{{Decision{}, 403}, {Decision{Reason: BadRequest, Response: custom}, 400}, {Decision{Response: custom}, 401}, {Decision{Response: &Response{}}, 403}} {
		if got := tt.d.DenialStatus(); got != tt.want {
			t.Errorf("%+v: %d; want %d", tt.d, got, tt.want)
		}
	}
}
