// The question of gRPC's health protocol, by the same HTTP/2 as that of a plain check.

package check

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"

	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// maxMessage bounds the answer, which is one small number.
const maxMessage = 1 << 10

func (c *Check) askGRPC(ctx context.Context, u *hop.Upstream, conn net.Conn) error {
	message, err := proto.Marshal(&healthgrpc.HealthCheckRequest{Service: c.Service})
	if err != nil {
		return fmt.Errorf("%s: %w", c.what(), err)
	}
	framed := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	r, err := c.request(ctx, u, http.MethodPost, healthgrpc.Health_Check_FullMethodName, bytes.NewReader(append(framed, message...)))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/grpc")
	r.Header.Set("TE", "trailers")
	res, err := roundTrip(conn, r, true)
	if err != nil {
		return fmt.Errorf("%s: %w", c.what(), err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxMessage))
	if err == nil {
		err = serving(res, body)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", c.what(), err)
	}
	return nil
}

// serving says why an answer is not that the service is well.
func serving(res *http.Response, body []byte) error {
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", res.StatusCode)
	}
	from := res.Trailer
	if res.Header.Get("Grpc-Status") != "" { // there is nothing but trailers
		from = res.Header
	}
	if code := from.Get("Grpc-Status"); code != "0" {
		text, err := url.PathUnescape(from.Get("Grpc-Message"))
		if err != nil {
			text = from.Get("Grpc-Message")
		}
		return fmt.Errorf("gRPC status %.10q: %.200q", code, text)
	}
	if len(body) < 5 || body[0] != 0 || int(binary.BigEndian.Uint32(body[1:5])) != len(body)-5 {
		return errors.New("the answer is no gRPC message")
	}
	var answer healthgrpc.HealthCheckResponse
	if err := proto.Unmarshal(body[5:], &answer); err != nil {
		return fmt.Errorf("the answer is no HealthCheckResponse: %w", err)
	}
	if answer.GetStatus() != healthgrpc.HealthCheckResponse_SERVING {
		return fmt.Errorf("the service is %s", answer.GetStatus())
	}
	return nil
}
