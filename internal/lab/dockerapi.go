// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
)

// Post calls the engine's API: d.Post(ctx, "/networks/blue/connect", …). It takes none of the time that a
// client program needs to start. body becomes JSON.
func (d *Docker) Post(ctx context.Context, path string, body any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://docker"+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", d.Socket)
		},
	}}
	answer, err := client.Do(req)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	if answer.StatusCode >= http.StatusMultipleChoices {
		err = fmt.Errorf("%s: %s: %s", path, answer.Status, bytes.TrimSpace(said))
	}
	return err
}

// Command prepares a call of the docker client, for as long as ctx lives.
func (d *Docker) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := d.lab.Host.Command(ctx, dockerCLI, args...)
	cmd.Env = d.Env()
	return cmd
}
