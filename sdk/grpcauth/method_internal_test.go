// The decision refuses ambiguous paths, too (sdk/authorize.go), and gRPC some of what is
// no method, so that no test through them would see that this package had stopped to.

package grpcauth

import (
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// sentTo is a stream that was opened with this path.
type sentTo string

func (s sentTo) Method() string                { return string(s) }
func (sentTo) SetHeader(metadata.MD) error     { return nil }
func (sentTo) SendHeader(metadata.MD) error    { return nil }
func (sentTo) SetTrailer(md metadata.MD) error { return nil }

func TestT15ExactMethodRefusesByItself(t *testing.T) {
	const served = "/shop.Orders/Get"
	for _, sent := range []string{
		"", "shop.Orders/Get", "/shop.Orders", "/shop.Orders/", "//Get", "//shop.Orders/Get", "/shop.Orders//Get", "/shop.Orders/Get/", "/shop.Orders/./Get",
		"/shop.Orders/%47et", "/shop.Orders%2fGet", "/shop.Orders/Get;x", "/shop.Orders/get", "/shop.orders/Get", "/shop.Orders/List", "/x/shop.Orders/Get",
	} {
		if got, err := exactMethod(grpc.NewContextWithServerTransportStream(t.Context(), sentTo(sent)), served); err == nil {
			t.Errorf("%q is taken as %q", sent, got)
		}
	}
	if got, err := exactMethod(grpc.NewContextWithServerTransportStream(t.Context(), sentTo(served)), served); err != nil || got != served {
		t.Errorf("exactMethod = %q, %v; want %s", got, err, served)
	}
	if _, err := exactMethod(t.Context(), served); err == nil {
		t.Error("a call without a stream is taken")
	}
}
