// The SDK as its users write it.

package sdk_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"time"

	"merlon.dev/sdk"
)

// A service of neither HTTP nor gRPC: the policy decides about each
// connection, by its tcp grants.
func Example() {
	id, err := sdk.Open(context.Background())
	if err != nil {
		log.Fatal(err) // a *sdk.NotReadyError, which names the cause
	}
	defer id.Close()

	inner, err := net.Listen("tcp", ":7000")
	if err != nil {
		log.Fatal(err)
	}
	lis := id.Listener(inner)
	for {
		conn, err := lis.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer conn.Close()
			fmt.Fprintln(conn, time.Now())
		}()
	}
}

// A client of it.
func ExampleIdentity_DialTLS() {
	ctx := context.Background()
	id, err := sdk.Open(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer id.Close()

	dial := id.DialTLS(sdk.Service("clock")) // spiffe://OWN-TRUST-DOMAIN/clock
	conn, err := dial(ctx, "tcp", "clock.internal:7000")
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
}
